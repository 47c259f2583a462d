package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// syncTries is how often fsync is measured.
const syncTries = 9

// filesystems by magic number (include/uapi/linux/magic.h): name, and whether
// it is reached over a network or served by a user process, or is lost at boot.
var filesystems = map[int64]struct {
	name              string
	network, volatile bool
}{
	0xEF53:     {name: "ext4"},
	0x58465342: {name: "xfs"},
	0x9123683E: {name: "btrfs"},
	0x2FC12FC1: {name: "zfs"},
	0xF2F52010: {name: "f2fs"},
	0xCA451A4E: {name: "bcachefs"},
	0x01021994: {name: "tmpfs", volatile: true},
	0x858458F6: {name: "ramfs", volatile: true},
	0x794C7630: {name: "overlayfs"},
	0x6969:     {name: "nfs", network: true},
	0xFF534D42: {name: "cifs", network: true},
	0xFE534D42: {name: "smb2", network: true},
	0x65735546: {name: "fuse", network: true},
	0x00C36400: {name: "ceph", network: true},
	0x01021997: {name: "9p", network: true},
	0x5346414F: {name: "afs", network: true},
	0x47504653: {name: "gpfs", network: true},
	0x0BD00BD0: {name: "lustre", network: true},
}

// gatherStore measures the store. The measuring runs apart, because a store that
// hangs does so inside system calls that nothing can end.
func gatherStore(ctx context.Context, dir string) StoreFacts {
	c := make(chan StoreFacts, 1)
	go func() { c <- measureStore(dir) }()
	t := time.NewTimer(stepTime)
	defer t.Stop()
	select {
	case s := <-c:
		return s
	case <-t.C:
	case <-ctx.Done():
	}
	return StoreFacts{Path: dir, Hung: true}
}

func measureStore(dir string) StoreFacts {
	s := StoreFacts{Path: dir}
	if abs, err := filepath.Abs(dir); err == nil {
		s.Path = abs
	}
	s.Probed = s.Path
	for {
		st, err := os.Stat(s.Probed)
		if err == nil {
			if s.Probed == s.Path {
				s.Exists, s.IsDir, s.Mode = true, st.IsDir(), uint32(st.Mode().Perm())
			} else if !st.IsDir() {
				s.WriteErr = fmt.Errorf("%s is not a directory: %w", s.Probed, unix.ENOTDIR)
				return s
			}
			break
		}
		up := filepath.Dir(s.Probed)
		// ENOTDIR: something on the way is a file; the loop finds it.
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) || up == s.Probed {
			s.WriteErr = err
			return s
		}
		s.Probed = up
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.Probed, &fs); err != nil {
		s.WriteErr = fmt.Errorf("statfs: %w", err)
		return s
	}
	kind, ok := filesystems[int64(fs.Type)]
	if !ok {
		kind.name = fmt.Sprintf("%#x", fs.Type)
	}
	s.FSType, s.Network, s.Volatile = kind.name, kind.network, kind.volatile
	s.FreeBytes, s.TotalBytes = fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize)
	if s.Exists && !s.IsDir {
		return s
	}
	s.SyncMedian, s.SyncMax, s.WriteErr = measureSync(s.Probed)
	return s
}

// measureSync writes and syncs a block of a file without a name, so that nothing
// is left behind whatever happens.
func measureSync(dir string) (median, worst time.Duration, err error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		// A filesystem without nameless files.
		var f *os.File
		if f, err = os.CreateTemp(dir, ".ckagent-doctor-"); err != nil {
			return 0, 0, err
		}
		defer f.Close()
		if err := os.Remove(f.Name()); err != nil {
			return 0, 0, err
		}
		return syncLoop(int(f.Fd()))
	}
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(fd)
	return syncLoop(fd)
}

func syncLoop(fd int) (median, worst time.Duration, err error) {
	block := make([]byte, 4096)
	var took []time.Duration
	for i := range syncTries {
		block[0] = byte(i)
		start := time.Now()
		if _, err := unix.Pwrite(fd, block, int64(i)*int64(len(block))); err != nil {
			return 0, 0, fmt.Errorf("write: %w", err)
		}
		if err := unix.Fsync(fd); err != nil {
			return 0, 0, fmt.Errorf("fsync: %w", err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)-1], nil
}
