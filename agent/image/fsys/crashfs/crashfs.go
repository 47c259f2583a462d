// Package crashfs records what is done to a file system and rebuilds the states
// in which a power loss at any point could leave it.
//
// The model is harsher than real file systems. Of a file, every write since its
// last Sync may be there, missing, cut off in the middle, or zeros of the right
// length, each independently of the others. Of a directory, every entry made,
// renamed or removed since its last SyncDir may have happened or not, in any
// combination; syncing a file does not make its name durable. A rename within a
// directory is atomic. What no test may count on here, no store counts on.
//
// A Recorder is safe for concurrent use; State only reads the record.
package crashfs

import (
	"fmt"
	"io"
	"math/rand"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
)

// Kind is the kind of a recorded operation.
type Kind int

const (
	Mkdir Kind = iota
	Create
	Write
	Sync
	Rename
	Link
	Remove
	SyncDir
)

var kindNames = [...]string{"mkdir", "create", "write", "sync", "rename", "link", "remove", "syncdir"}

// Op is one operation that succeeded.
type Op struct {
	Kind Kind
	Name string
	To   string // of a Rename or a Link
	Off  int64
	Data []byte
}

func (o Op) String() string {
	s := kindNames[o.Kind] + " " + o.Name
	if o.Kind == Rename || o.Kind == Link {
		s += " -> " + filepath.Base(o.To)
	}
	if o.Kind == Write {
		s += fmt.Sprintf(" [%d, +%d)", o.Off, len(o.Data))
	}
	return s
}

// Recorder is an fsys.FS in memory that writes down what changes.
type Recorder struct {
	*memfs.FS
	mu  sync.Mutex
	ops []Op
}

// New makes an empty one.
func New() *Recorder { return &Recorder{FS: memfs.New(1 << 30)} }

// Ops is the record so far.
func (r *Recorder) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ops[:len(r.ops):len(r.ops)]
}

// do runs an operation and records it, both under one lock: the record is in the
// order in which things happened.
func (r *Recorder) do(o Op, f func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := f()
	if err == nil {
		r.ops = append(r.ops, o)
	}
	return err
}

// Mkdir implements fsys.FS.
func (r *Recorder) Mkdir(name string) error {
	return r.do(Op{Kind: Mkdir, Name: name}, func() error { return r.FS.Mkdir(name) })
}

// Create implements fsys.FS.
func (r *Recorder) Create(name string) (f fsys.File, err error) {
	err = r.do(Op{Kind: Create, Name: name}, func() error { f, err = r.FS.Create(name); return err })
	if err != nil {
		return nil, err
	}
	return &file{File: f, r: r, name: name}, nil
}

// Open implements fsys.FS.
func (r *Recorder) Open(name string) (fsys.ReadFile, error) {
	f, err := r.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return &readFile{ReadFile: f, r: r, name: name}, nil
}

// Rename implements fsys.FS; both names are in one directory.
func (r *Recorder) Rename(oldname, newname string) error {
	if filepath.Dir(oldname) != filepath.Dir(newname) {
		return fmt.Errorf("crashfs models no rename from %s to %s", oldname, newname)
	}
	return r.do(Op{Kind: Rename, Name: oldname, To: newname}, func() error { return r.FS.Rename(oldname, newname) })
}

// Link implements fsys.FS.
func (r *Recorder) Link(oldname, newname string) error {
	return r.do(Op{Kind: Link, Name: oldname, To: newname}, func() error { return r.FS.Link(oldname, newname) })
}

// Remove implements fsys.FS.
func (r *Recorder) Remove(name string) error {
	return r.do(Op{Kind: Remove, Name: name}, func() error { return r.FS.Remove(name) })
}

// SyncDir implements fsys.FS.
func (r *Recorder) SyncDir(name string) error {
	return r.do(Op{Kind: SyncDir, Name: name}, func() error { return r.FS.SyncDir(name) })
}

// TryLock implements fsys.FS. The making of a lock file is not worth recording:
// nothing depends on its being there.
func (r *Recorder) TryLock(name string) (io.Closer, error) { return r.FS.TryLock(name) }

type file struct {
	fsys.File
	r    *Recorder
	name string
}

func (f *file) WriteVec(bufs [][]byte, off int64) error {
	var data []byte
	for _, b := range bufs {
		data = append(data, b...)
	}
	return f.r.do(Op{Kind: Write, Name: f.name, Off: off, Data: data}, func() error { return f.File.WriteVec(bufs, off) })
}

func (f *file) Sync() error {
	return f.r.do(Op{Kind: Sync, Name: f.name}, f.File.Sync)
}

type readFile struct {
	fsys.ReadFile
	r    *Recorder
	name string
}

func (f *readFile) Sync() error {
	return f.r.do(Op{Kind: Sync, Name: f.name}, f.ReadFile.Sync)
}

// Loss says what becomes of what was not synced.
type Loss int

const (
	LoseAll  Loss = iota // only what was synced is there
	LoseNone             // as if the process had died and the host had not
	LoseSome             // any of it, by the random source
)

type inode struct {
	dir bool
	// of a file
	durable []byte
	writes  []Op
	crashed *memfs.Node // what it is after the loss: the same under all of its names
	// of a directory
	entries map[string]*inode // as the processes saw it
	kept    map[string]*inode // durable
	changes []change
}

type change struct {
	name string
	set  *inode // nil: remove only
	gone string // name removed along with it, by a rename
}

func newDir() *inode {
	return &inode{dir: true, entries: map[string]*inode{}, kept: map[string]*inode{}}
}

// State rebuilds the file system after a power loss that followed these
// operations (a prefix of a record).
func State(ops []Op, loss Loss, rnd *rand.Rand) *memfs.FS {
	root := newDir()
	at := func(name string) *inode {
		n := root
		for _, p := range strings.FieldsFunc(name, func(c rune) bool { return c == '/' }) {
			n = n.entries[p]
		}
		return n
	}
	for _, o := range ops {
		dir, base := at(filepath.Dir(o.Name)), filepath.Base(o.Name)
		switch o.Kind {
		case Mkdir, Create:
			n := &inode{}
			if o.Kind == Mkdir {
				n = newDir()
			}
			dir.entries[base] = n
			dir.changes = append(dir.changes, change{name: base, set: n})
		case Write:
			n := at(o.Name)
			n.writes = append(n.writes, o)
		case Sync:
			n := at(o.Name)
			for _, w := range n.writes {
				n.durable = apply(n.durable, w.Off, w.Data)
			}
			n.writes = nil
		case Rename:
			to := filepath.Base(o.To)
			n := dir.entries[base]
			delete(dir.entries, base)
			dir.entries[to] = n
			dir.changes = append(dir.changes, change{name: to, set: n, gone: base})
		case Link:
			to, name := at(filepath.Dir(o.To)), filepath.Base(o.To)
			to.entries[name] = dir.entries[base]
			to.changes = append(to.changes, change{name: name, set: dir.entries[base]})
		case Remove:
			delete(dir.entries, base)
			dir.changes = append(dir.changes, change{gone: base})
		case SyncDir:
			n := at(o.Name)
			n.settle(func(int) bool { return true })
			n.changes = nil
		}
	}
	return memfs.FromTree(root.crash(loss, rnd))
}

// settle makes the chosen changes durable.
func (n *inode) settle(choose func(i int) bool) {
	for i, c := range n.changes {
		if !choose(i) {
			continue
		}
		delete(n.kept, c.gone)
		if c.set != nil {
			n.kept[c.name] = c.set
		}
	}
}

func (n *inode) crash(loss Loss, rnd *rand.Rand) *memfs.Node {
	if n.crashed != nil {
		return n.crashed
	}
	if !n.dir {
		out := &memfs.Node{Data: append([]byte{}, n.durable...)}
		for _, w := range n.writes {
			data := w.Data
			switch {
			case loss == LoseAll:
				continue
			case loss == LoseNone:
			case rnd.Intn(3) == 0:
				continue // lost
			case rnd.Intn(3) == 0:
				data = data[:rnd.Intn(len(data)+1)] // cut off
			case rnd.Intn(3) == 0:
				data = make([]byte, len(data)) // the size came through, the content did not
			}
			out.Data = apply(out.Data, w.Off, data)
		}
		n.crashed = out
		return out
	}
	n.settle(func(int) bool { return loss == LoseNone || loss == LoseSome && rnd.Intn(2) == 0 })
	out := memfs.NewDir()
	for name, e := range n.kept {
		out.Entries[name] = e.crash(loss, rnd)
	}
	return out
}

func apply(content []byte, off int64, data []byte) []byte {
	if end := int(off) + len(data); end > len(content) {
		content = append(content, make([]byte, end-len(content))...)
	}
	copy(content[off:], data)
	return content
}
