/** Longer ones than any message of an API are no lines. */
const LONGEST = 64 * 1024 * 1024;

/**
 * The lines of a stream of text, without their ends and without empty ones. Not by node:readline: when a connection breaks off, that
 * either waits for ever or ends the process (docs/kernel-notes.md). @throws Error of the stream, or for a line that has no end
 */
export async function* linesOf(stream: NodeJS.ReadableStream): AsyncGenerator<string> {
  let tail = '';
  stream.setEncoding('utf8');
  for await (const part of stream) {
    const lines = (tail + part).split('\n');
    tail = lines.pop() ?? '';
    if (tail.length > LONGEST) throw new Error('a line has no end');
    for (const line of lines) if (line.trim() !== '') yield line;
  }
}
