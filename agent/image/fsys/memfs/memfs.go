package memfs

import (
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image/fsys"
)

// FS is a file system in memory; New makes one.
type FS struct {
	mu       sync.Mutex
	root     *Node
	capacity uint64 // bytes of file content
	used     uint64
}

// Node is a file or a directory. Tests that build a tree by hand fill it in.
type Node struct {
	Entries map[string]*Node // of a directory; nil for a file
	Data    []byte
	ModTime time.Time
	locked  bool
	more    int // names beside the first
}

// NewDir makes a directory node.
func NewDir() *Node { return &Node{Entries: map[string]*Node{}, ModTime: time.Now()} }

// New makes an empty file system with room for so many bytes of file content.
func New(capacity uint64) *FS { return &FS{root: NewDir(), capacity: capacity} }

// FromTree makes a file system of a tree, which it takes over.
func FromTree(root *Node) *FS { return &FS{root: root, capacity: 1 << 40} }

var _ fsys.FS = (*FS)(nil)

// Update changes the content of a file behind everybody's back, as a failing disk
// would: f gets the content and returns the new one.
func (m *FS) Update(name string, f func([]byte) []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("update", name)
	if err == nil {
		n.Data = f(append([]byte(nil), n.Data...))
	}
	return err
}

func fail(op, name string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }

func parts(name string) []string {
	return strings.FieldsFunc(filepath.Clean(name), func(r rune) bool { return r == '/' })
}

func (m *FS) find(op, name string) (*Node, error) {
	n := m.root
	for _, p := range parts(name) {
		if n.Entries == nil {
			return nil, fail(op, name, unix.ENOTDIR)
		}
		next, ok := n.Entries[p]
		if !ok {
			return nil, fail(op, name, unix.ENOENT)
		}
		n = next
	}
	return n, nil
}

// parent finds the directory of a name and the last component.
func (m *FS) parent(op, name string) (*Node, string, error) {
	dir, err := m.find(op, filepath.Dir(name))
	if err != nil {
		return nil, "", err
	}
	if dir.Entries == nil {
		return nil, "", fail(op, name, unix.ENOTDIR)
	}
	return dir, filepath.Base(name), nil
}

// Mkdir implements fsys.FS.
func (m *FS) Mkdir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, err := m.parent("mkdir", name)
	if err != nil {
		return err
	}
	if dir.Entries[base] != nil {
		return fail("mkdir", name, unix.EEXIST)
	}
	dir.Entries[base] = NewDir()
	return nil
}

// Create implements fsys.FS.
func (m *FS) Create(name string) (fsys.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, err := m.parent("open", name)
	if err != nil {
		return nil, err
	}
	if dir.Entries[base] != nil {
		return nil, fail("open", name, unix.EEXIST)
	}
	n := &Node{Data: []byte{}, ModTime: time.Now()}
	dir.Entries[base] = n
	return &file{m: m, n: n, name: name}, nil
}

// Open implements fsys.FS.
func (m *FS) Open(name string) (fsys.ReadFile, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.Entries != nil {
		return nil, fail("open", name, fmt.Errorf("not a regular file"))
	}
	return &file{m: m, n: n, name: name, size: int64(len(n.Data))}, nil
}

// ReadDir implements fsys.FS.
func (m *FS) ReadDir(name string) ([]fsys.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.Entries == nil {
		return nil, fail("open", name, unix.ENOTDIR)
	}
	out := make([]fsys.Entry, 0, len(n.Entries))
	for name, e := range n.Entries {
		out = append(out, fsys.Entry{Name: name, Dir: e.Entries != nil})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// Stat implements fsys.FS.
func (m *FS) Stat(name string) (fsys.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("stat", name)
	if err != nil {
		return fsys.Info{}, err
	}
	if n.Entries != nil {
		return fsys.Info{Dir: true, Mode: 0o700, ModTimeNS: n.ModTime.UnixNano()}, nil
	}
	return fsys.Info{Regular: true, Mode: 0o600, Bytes: int64(len(n.Data)),
		DiskBytes: int64(len(n.Data)), ModTimeNS: n.ModTime.UnixNano()}, nil
}

// Rename implements fsys.FS.
func (m *FS) Rename(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	from, oldbase, err := m.parent("rename", oldname)
	if err != nil {
		return err
	}
	to, newbase, err := m.parent("rename", newname)
	if err != nil {
		return err
	}
	n := from.Entries[oldbase]
	if n == nil {
		return fail("rename", oldname, unix.ENOENT)
	}
	if old := to.Entries[newbase]; old != nil && old.Entries != nil {
		return fail("rename", newname, unix.EISDIR)
	}
	delete(from.Entries, oldbase)
	to.Entries[newbase] = n
	return nil
}

// Remove implements fsys.FS.
func (m *FS) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, err := m.parent("remove", name)
	if err != nil {
		return err
	}
	n := dir.Entries[base]
	switch {
	case n == nil:
		return fail("remove", name, unix.ENOENT)
	case len(n.Entries) > 0:
		return fail("remove", name, unix.ENOTEMPTY)
	}
	if n.more > 0 {
		n.more--
	} else {
		m.used -= min(uint64(len(n.Data)), m.used)
	}
	delete(dir.Entries, base)
	return nil
}

// Link implements fsys.FS.
func (m *FS) Link(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("link", oldname)
	if err != nil {
		return err
	}
	to, base, err := m.parent("link", newname)
	switch {
	case err != nil:
		return err
	case n.Entries != nil:
		return fail("link", oldname, unix.EPERM)
	case to.Entries[base] != nil:
		return fail("link", newname, unix.EEXIST)
	}
	to.Entries[base] = n
	n.more++
	return nil
}

// SyncDir implements fsys.FS.
func (m *FS) SyncDir(name string) error {
	_, err := m.ReadDir(name)
	return err
}

// TryLock implements fsys.FS.
func (m *FS) TryLock(name string) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, err := m.parent("lock", name)
	if err != nil {
		return nil, err
	}
	n := dir.Entries[base]
	if n == nil {
		n = &Node{Data: []byte{}, ModTime: time.Now()}
		dir.Entries[base] = n
	}
	if n.locked {
		return nil, fail("lock", name, fsys.ErrLocked)
	}
	n.locked = true
	return &lock{m: m, release: func() { n.locked = false }}, nil
}

// Space implements fsys.FS.
func (m *FS) Space(string) (fsys.Space, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fsys.Space{FreeBytes: m.capacity - min(m.used, m.capacity), TotalBytes: m.capacity}, nil
}

type lock struct {
	m       *FS
	release func()
}

func (l *lock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.release()
	l.release = func() {}
	return nil
}

type file struct {
	m    *FS
	n    *Node
	name string
	size int64
}

func (f *file) WriteVec(bufs [][]byte, off int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	for _, b := range bufs {
		if end := off + int64(len(b)); end > int64(len(f.n.Data)) {
			grow := uint64(end) - uint64(len(f.n.Data))
			if f.m.used+grow > f.m.capacity {
				return fail("write", f.name, unix.ENOSPC)
			}
			f.m.used += grow
			f.n.Data = append(f.n.Data, make([]byte, grow)...)
		}
		copy(f.n.Data[off:], b)
		off += int64(len(b))
	}
	f.n.ModTime = time.Now()
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if off >= int64(len(f.n.Data)) {
		return 0, io.EOF
	}
	n := copy(p, f.n.Data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) StartWriteback(int64, int64) {}
func (f *file) Direct()                     {}
func (f *file) Size() int64                 { return f.size }
func (f *file) Sync() error                 { return nil }
func (f *file) Close() error                { return nil }
