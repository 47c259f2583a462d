package image

import (
	"context"
	"errors"
	"io"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// SumFile reads a whole file and returns its size and checksum.
func SumFile(ctx context.Context, f fsys.FS, path string) (bytes uint64, sum Checksum, err error) {
	const op = "read volume"
	r, err := f.Open(path)
	if err != nil {
		return 0, 0, fsys.Problem(op, path, err)
	}
	defer r.Close()
	h := xxhash.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return 0, 0, problem.New(problem.Cancelled, op, path, "%w", err)
		}
		n, err := r.ReadAt(buf, off)
		_, _ = h.Write(buf[:n]) // a hash takes everything
		off += int64(n)
		if errors.Is(err, io.EOF) {
			return uint64(off), Checksum(h.Sum64()), nil
		}
		if err != nil {
			return 0, 0, fsys.Problem(op, path, err)
		}
	}
}
