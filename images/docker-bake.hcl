# Release build: both images for both architectures, with bill of materials and provenance.
#   node images/bundle.ts amd64 arm64 && docker buildx bake -f images/docker-bake.hcl --push
# Needs a buildx builder of the docker-container driver, and a registry. `make images` builds for this machine alone.

variable "VERSION" { default = "dev" }
variable "REVISION" { default = "unknown" }
variable "CREATED" { default = "1970-01-01T00:00:00Z" }
variable "SOURCE" { default = "" }
variable "REPOSITORY" { default = "" }
variable "BASE_IMAGE" { default = "debian:trixie-slim" }
variable "BASE_DIGEST" { default = "" }

group "default" { targets = ["router", "client"] }

target "base" {
  context    = "dist/image"
  dockerfile = "../../images/Dockerfile.base"
  platforms  = ["linux/amd64", "linux/arm64"]
  args = {
    BASE_IMAGE  = BASE_DIGEST == "" ? BASE_IMAGE : "${BASE_IMAGE}@${BASE_DIGEST}"
    BASE_NAME   = BASE_IMAGE
    BASE_DIGEST = BASE_DIGEST
    VERSION     = VERSION
    REVISION    = REVISION
    CREATED     = CREATED
    SOURCE      = SOURCE
  }
}

target "release" {
  context   = "images"
  platforms = ["linux/amd64", "linux/arm64"]
  contexts  = { shared = "target:base" }
  args      = { SHARED = "shared" }
  attest    = ["type=sbom", "type=provenance,mode=max"]
}

target "router" {
  inherits   = ["release"]
  dockerfile = "Dockerfile.router"
  tags       = ["${REPOSITORY}detour-router:${VERSION}"]
}

target "client" {
  inherits   = ["release"]
  dockerfile = "Dockerfile.client"
  tags       = ["${REPOSITORY}detour-client:${VERSION}"]
}
