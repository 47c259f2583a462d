package overlay

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
)

// Check makes sure that the volumes in dir are those that a manifest names: of its
// very checkpoint and not merely of the same disk. It reads each volume whole, unless
// that was done before and the file has not changed since (image.Sealed).
func Check(ctx context.Context, dir string, m *image.Manifest) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(min(runtime.GOMAXPROCS(0), 4))
	for _, d := range m.Disks {
		below := ""
		for i := len(d.Volumes) - 1; i >= 0; i-- {
			v, backing := d.Volumes[i], below
			below = v.Name
			g.Go(func() error { return checkVolume(gctx, m.ID, filepath.Join(dir, v.Name), v, backing) })
		}
	}
	return g.Wait()
}

func checkVolume(ctx context.Context, id, path string, v image.Volume, backing string) error {
	damaged := func(format string, args ...any) error {
		return problem.New(problem.Integrity, "check volume", path, format, args...).
			WithHint("it is damaged, or of another instant than the memory of checkpoint %s, which must not run with it: restore another checkpoint", id)
	}
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return damaged("%w", err)
	case err != nil:
		return fsys.Problem("check volume", path, err)
	case !st.Mode().IsRegular() || uint64(st.Size()) != v.Bytes:
		return damaged("it has %d bytes, and %d when checkpoint %s was taken", st.Size(), v.Bytes, id)
	}
	h, err := qcow2.ReadHeader(path)
	if err != nil {
		return damaged("%w", err)
	}
	if h.Backing != backing {
		return damaged("its backing file is %q, and %q when checkpoint %s was taken", h.Backing, backing, id)
	}
	if image.Sealed(path, v) {
		return nil
	}
	n, sum, err := image.SumFile(ctx, fsys.OS{}, path)
	if err != nil {
		return err
	}
	if n != v.Bytes || sum != v.Checksum {
		return damaged("its checksum is %v, and %v when checkpoint %s was taken", sum, v.Checksum, id)
	}
	image.Seal(path, v)
	return nil
}
