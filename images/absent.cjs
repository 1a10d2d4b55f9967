// In the place of packages that dockerode would bring for what the agent never does: build images (gRPC), or reach an engine by
// ssh. 15 MB of memory less.
const absent = () => {
  throw new Error('this build of detour has no gRPC and no ssh');
};
module.exports = { Server: absent, Client: absent, loadSync: absent };
