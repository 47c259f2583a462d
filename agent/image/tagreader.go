package image

import (
	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// tagReader reads the file of the tags once, in pieces: a manifest may name one of any
// size, and its word is not worth that much memory.
type tagReader struct {
	f    fsys.ReadFile
	path string
	want Checksum
	hash *xxhash.Digest
	off  uint64 // read so far
	size uint64
	buf  []byte
	rest []byte // of buf, not yet given out
}

// tagPiece is what is read at a time, a multiple of a tag.
const tagPiece = 64 << 10

const readTags = "read tags"

// openTags opens the file of the tags. The caller closes it.
func (r *Reader) openTags() (*tagReader, error) {
	ref := r.manifest.Tags
	if ref == nil {
		return nil, problem.New(problem.Refused, readTags, r.dir, "the checkpoint has none")
	}
	f, err := r.openFile(ref.Name, ref.Bytes)
	if err != nil {
		return nil, err
	}
	return &tagReader{f: f, path: r.path(ref.Name), want: ref.Checksum, hash: xxhash.New(), size: ref.Bytes,
		buf: make([]byte, min(tagPiece, ref.Bytes))}, nil
}

func (t *tagReader) close() { t.f.Close() }

// fill reads the next piece; at the end there is none.
func (t *tagReader) fill() error {
	piece := t.buf[:min(uint64(len(t.buf)), t.size-t.off)]
	if err := readFull(readTags, t.path, t.f, piece, int64(t.off)); err != nil {
		return err
	}
	_, _ = t.hash.Write(piece) // a hash takes everything
	t.off += uint64(len(piece))
	t.rest = piece
	return nil
}

// next is the next tag.
func (t *tagReader) next() (tag Tag, err error) {
	if len(t.rest) == 0 {
		if err := t.fill(); err != nil {
			return tag, err
		}
	}
	if len(t.rest) < TagBytes {
		return tag, corrupt(readTags, t.path, "it has fewer tags than there are pages that are not zeros")
	}
	tag, t.rest = Tag(t.rest[:TagBytes]), t.rest[TagBytes:]
	return tag, nil
}

// finish reads what is left, checks the whole, and returns how many bytes were left.
func (t *tagReader) finish() (left uint64, err error) {
	left = t.size - t.off + uint64(len(t.rest))
	for t.off < t.size {
		if err := t.fill(); err != nil {
			return left, err
		}
	}
	if got := Checksum(t.hash.Sum64()); got != t.want {
		return left, corrupt(readTags, t.path, "checksum is %v: expected %v", got, t.want)
	}
	return left, nil
}

// checkTags reads the file of the tags for its checksum alone.
func (r *Reader) checkTags() error {
	t, err := r.openTags()
	if err != nil {
		return err
	}
	defer t.close()
	_, err = t.finish()
	return err
}
