package diskcopy

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// undoPatience is for taking our things out of QEMU after a failure or a cancel.
const undoPatience = 20 * time.Second

// explain says why a copy failed, as far as that can be told from outside.
func (s *Set) explain(d *item, text string) error {
	p := problem.New(problem.Failed, "copy", "disk "+d.src.Drive.Name, "QEMU says: %s", text)
	var st unix.Statfs_t
	if unix.Fstatfs(int(d.file.Fd()), &st) == nil && st.Bavail*uint64(st.Bsize) < 1<<20 {
		p.Code = problem.Store
		return p.WithHint("the store is full: ckagent gc, ckagent rm, or a smaller --keep-last")
	}
	if used, limit := d.memoryUse(); limit > 0 && used > limit-limit/8 {
		p.Code = problem.Busy
		return p.WithHint("the guest overwrote more than the %d MiB kept for old content of this disk: raise --disk-memory or --disk-speed", limit>>20)
	}
	return p
}

// memoryUse is how much of the memory for old content is in use, in bytes.
func (d *item) memoryUse() (used, limit uint64) {
	var st unix.Stat_t
	if d.memory == nil || unix.Fstat(int(d.memory.Fd()), &st) != nil {
		return 0, 0
	}
	return uint64(st.Blocks) * 512, uint64(st.Size)
}

// Finish takes everything of ours but the bitmaps out of QEMU.
func (s *Set) Finish(ctx context.Context) error {
	if !s.inGraph {
		return nil
	}
	if _, err := disk.Sweep(ctx, s.c.QMP, false); err != nil {
		return problem.New(problem.Failed, "let go of the disks", "VM "+s.c.VM, "%w", err)
	}
	s.inGraph = false
	return nil
}

// Seal makes the volumes durable and describes them.
func (s *Set) Seal(ctx context.Context) ([]image.Disk, error) {
	var out []image.Disk
	for _, d := range s.items {
		path := s.volumePath(d.volume)
		if err := d.file.Sync(); err != nil {
			return nil, fsys.Problem("sync volume", path, err)
		}
		v := image.Volume{Name: d.volume}
		var err error
		if v.Bytes, v.Checksum, err = image.SumFile(ctx, s.c.Txn.FS(), path); err != nil {
			return nil, err
		}
		image.Seal(path, v) // the first restore need not read it all again
		e := d.src.Record()
		e.Method, e.Volumes = image.DiskBackup, []image.Volume{v}
		if d.base != nil {
			e.Volumes = append(e.Volumes, d.base.chain...)
		}
		out = append(out, e)
	}
	return out, nil
}

// Keep is called when the checkpoint exists: its bitmaps count from now on.
func (s *Set) Keep(ctx context.Context) error {
	var errs []error
	for _, d := range s.items {
		if d.base == nil {
			continue
		}
		if err := s.c.QMP.Execute(ctx, "block-dirty-bitmap-remove", bitmapArgs(d.src.Tracked(), d.base.bitmap), nil); err != nil {
			// It records nothing any more; the next checkpoint removes it.
			errs = append(errs, s.failed("remove an old bitmap", d, err))
		}
	}
	return errors.Join(append(errs, s.close())...)
}

// Drop puts the graph and the bitmaps back as they were.
func (s *Set) Drop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	var errs []error
	if len(s.items) > 0 && s.c.QMP.Err() == nil {
		errs = append(errs, s.Finish(ctx), s.restoreBitmaps(ctx))
	}
	return errors.Join(append(errs, s.close())...)
}

// restoreBitmaps gives each old bitmap back what the new one has recorded.
func (s *Set) restoreBitmaps(ctx context.Context) error {
	g, err := disk.Read(ctx, s.c.QMP)
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range s.items {
		node := g.Nodes[d.src.Tracked()]
		if node == nil {
			continue
		}
		for _, b := range node.Bitmaps {
			if b.Name != s.bitmap() {
				continue
			}
			var actions []any
			act := func(kind string, data map[string]any) {
				actions = append(actions, map[string]any{"type": kind, "data": data})
			}
			if d.base != nil {
				act("block-dirty-bitmap-merge", map[string]any{"node": d.src.Tracked(), "target": d.base.bitmap, "bitmaps": []string{b.Name}})
				act("block-dirty-bitmap-enable", bitmapArgs(d.src.Tracked(), d.base.bitmap))
			}
			act("block-dirty-bitmap-remove", bitmapArgs(d.src.Tracked(), b.Name))
			errs = append(errs, s.c.QMP.Execute(ctx, "transaction", map[string]any{"actions": actions}, nil))
		}
	}
	return errors.Join(errs...)
}

func (s *Set) close() error {
	errs := []error{s.dropOverlays()}
	for _, d := range s.items {
		for _, f := range []*os.File{d.file, d.memory, d.above} {
			if f != nil {
				_ = f.Close() // what counts was synced, and what was not does not count
			}
		}
		d.file, d.memory, d.above = nil, nil, nil
	}
	return errors.Join(append(errs, s.closeParents())...)
}
