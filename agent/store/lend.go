package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
)

// Lend gives another process of this host a reader's lease on the checkpoint, which
// lasts as long as that process lives, whatever becomes of this one: a QEMU whose
// disks are built on the checkpoint's volumes reads them until it ends. takeBack ends
// it sooner; GC removes what is left of it afterwards. On a read-only store there is
// nothing to lend.
func (i *Image) Lend(ctx context.Context, pid int, startTicks uint64) (takeBack func() error, err error) {
	const op = "lend checkpoint"
	if !i.Leased {
		return func() error { return nil }, nil
	}
	if pid <= 0 || startTicks == 0 {
		return nil, problem.New(problem.Failed, op, i.Manifest().ID, "pid %d started at %d: no process", pid, startTicks)
	}
	other := i.s.id
	other.pid, other.startTicks = pid, startTicks
	name := filepath.Join(filepath.Dir(i.lease), other.leaseName(Reading, i.s.random()))
	// Our own lease keeps the checkpoint where it is: no lock is needed.
	if err := ctx.Err(); err != nil {
		return nil, problem.New(problem.Cancelled, op, name, "%w", err)
	}
	f, err := i.s.fs.Create(name)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return nil, fsys.Problem(op, name, err)
	}
	return sync.OnceValue(func() error { return fsys.Problem("release lease", name, removeFile(i.s.fs, name)) }), nil
}

// maxHoldBytes bounds a path in a lease of role Disk.
const maxHoldBytes = 4096

// HoldFor keeps the checkpoint for as long as there is an image at path, on this
// host, that has a backing file: the disk of a restored VM needs the volumes it is
// built on whether or not the VM runs. It may be called before the image is there,
// by who has the checkpoint open. release ends it sooner.
func (i *Image) HoldFor(ctx context.Context, path string) (release func() error, err error) {
	const op = "hold checkpoint"
	if !i.Leased {
		return func() error { return nil }, nil
	}
	if !filepath.IsAbs(path) || len(path) > maxHoldBytes {
		return nil, problem.New(problem.Failed, op, path, "no absolute path of at most %d bytes", maxHoldBytes)
	}
	if err := ctx.Err(); err != nil {
		return nil, problem.New(problem.Cancelled, op, path, "%w", err)
	}
	dir := filepath.Dir(i.lease)
	name := filepath.Join(dir, i.s.id.leaseName(Disk, i.s.random()))
	// Durable, unlike a process's lease: the image outlives a crash of the host.
	err = fsys.WriteFile(i.s.fs, name, []byte(path))
	if err == nil {
		err = i.s.fs.SyncDir(dir)
	}
	if err != nil {
		return nil, fsys.Problem(op, name, err)
	}
	return sync.OnceValue(func() error { return fsys.Problem("release lease", name, removeFile(i.s.fs, name)) }), nil
}

// resolveDisk finds out whether the image of a Disk lease still needs the checkpoint. It
// does while who took the lease is about to make it: that process may be between the
// lease's name and its content, or between the lease and the image. What cannot be told
// counts as needed.
func (s *Store) resolveDisk(l *Lease, name string) {
	if l.Host != s.id.host {
		l.State = Unknown
		return
	}
	unmade := l.State // as the process that took it
	l.State = Live
	b, err := fsys.ReadFileLimit(s.fs, name, maxHoldBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.State = Dead // given back just now
		return
	case err != nil:
		return
	case !filepath.IsAbs(string(b)):
		l.State = unmade
		return
	}
	l.Path = strings.ToValidUTF8(string(b), "?")
	switch h, err := qcow2.ReadHeader(string(b)); {
	case errors.Is(err, fs.ErrNotExist):
		l.State = unmade
	case err == nil && h.Backing == "":
		l.State = Dead
	}
}
