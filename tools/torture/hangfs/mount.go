package hangfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Mounted is a file system of this package.
type Mounted struct {
	*gate
	path   string
	server *fuse.Server
	dev    uint64
}

// Mount shows dir at path, which must exist.
func Mount(path, dir string) (*Mounted, error) {
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("hangfs over %s: %w", dir, err)
	}
	second := time.Second
	g := newGate(fs.NewNodeFS(root, &fs.Options{EntryTimeout: &second, AttrTimeout: &second}))
	server, err := fuse.NewServer(g, path, &fuse.MountOptions{FsName: "hangfs", Name: "hangfs", DirectMountStrict: true})
	if err != nil {
		return nil, fmt.Errorf("mount hangfs on %s: %w", path, err)
	}
	go server.Serve() // ends with the mount; joined by Close
	if err := server.WaitMount(); err != nil {
		return nil, fmt.Errorf("mount hangfs on %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("mount hangfs on %s: %w", path, err)
	}
	return &Mounted{gate: g, path: path, server: server, dev: st.Dev}, nil
}

// Path is where it is mounted.
func (m *Mounted) Path() string { return m.path }

// Close ends it, whatever hangs in it.
func (m *Mounted) Close() error {
	m.release()
	// Requests that somebody waits for in the kernel end with an error: nothing
	// else gets a process out of there.
	control := filepath.Join("/sys/fs/fuse/connections", strconv.FormatUint(uint64(unix.Minor(m.dev)), 10), "abort")
	_ = os.WriteFile(control, []byte("1"), 0) // not mounted in every container; then what hangs was released above
	if err := unix.Unmount(m.path, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount hangfs from %s: %w", m.path, err)
	}
	m.server.Wait()
	return nil
}
