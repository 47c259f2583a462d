package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// Info is what a list shows of one checkpoint.
type Info struct {
	ID            string
	VM            string
	CreatedAt     time.Time
	Mode, Engine  string
	Parent        string
	Depth         int // steps to a checkpoint that stored every page itself
	GroupID       string
	Epoch         uint64
	RAMBytes      uint64
	StoredBytes   uint64 // written for it
	Inherited     uint64 // bytes of segments that it shares with others
	Pages         uint64
	ZeroPages     uint64
	CapturedPages uint64
	PauseNS       int64
	Discarded     int // attempts before it succeeded
	Pinned        bool
	Leases        []Lease // all there are, also dead ones
	Dir           string
	// Damage is why the manifest cannot be read; nil if it can. Of a damaged one
	// only ID, VM, CreatedAt (from the id), Pinned, Leases and Dir are known.
	Damage error
}

// Leased reports whether somebody uses the checkpoint, or might.
func (i Info) Leased() bool { return len(held(i.Leases, false)) > 0 }

// candidate is a directory that looks like a checkpoint's.
type candidate struct {
	id, vmDir string
	dir       string
	committed bool
	pinned    bool
	leases    []Lease
	files     []string
}

// vmDirs lists the VMs' directories; NotFound without a store.
func (s *Store) vmDirs(op string) ([]string, error) {
	entries, err := s.fs.ReadDir(filepath.Join(s.dir, vmsName))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := s.fs.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
			return nil, s.noStore(op)
		}
		return nil, nil
	}
	if err != nil {
		return nil, fsys.Problem(op, s.dir, err)
	}
	var out []string
	for _, e := range entries {
		if e.Dir {
			out = append(out, e.Name)
		}
	}
	return out, nil
}

// candidates looks into one VM's directory; oldest first. Names that are no ids
// are somebody else's and left alone.
func (s *Store) candidates(op, vm string) ([]candidate, error) {
	path := filepath.Join(s.dir, vmsName, vm)
	entries, err := s.fs.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fsys.Problem(op, path, err)
	}
	var out []candidate
	for _, e := range entries {
		if _, ok := parseID(e.Name); !ok || !e.Dir {
			continue
		}
		c, err := s.look(op, vm, e.Name)
		if problem.Is(err, problem.NotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// look reads one checkpoint's directory.
func (s *Store) look(op, vm, id string) (candidate, error) {
	c := candidate{id: id, vmDir: vm, dir: filepath.Join(s.dir, vmsName, vm, id)}
	entries, err := s.fs.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return c, problem.New(problem.NotFound, op, id, "no such checkpoint: %w", err)
	}
	if err != nil {
		return c, fsys.Problem(op, c.dir, err)
	}
	for _, e := range entries {
		c.files = append(c.files, e.Name)
		if l, ok := s.id.parseLease(e.Name); ok {
			if l.Role == Disk {
				s.resolveDisk(&l, filepath.Join(c.dir, e.Name))
			}
			c.leases = append(c.leases, l)
		}
		c.committed = c.committed || e.Name == image.ManifestName
		c.pinned = c.pinned || e.Name == pinName
	}
	return c, nil
}

// matches makes sure that a manifest belongs to its path.
func (c candidate) matches(m *image.Manifest) error {
	if m.ID == c.id && vmDir(m.VM) == c.vmDir {
		return nil
	}
	return problem.New(problem.Integrity, "read manifest", c.dir, "it is of checkpoint %s of VM %q", m.ID, m.VM).
		WithHint("the directory was moved or copied by hand: give it back its name")
}

// info reads the manifest of a committed candidate.
func (s *Store) info(c candidate) (Info, *image.Manifest, error) {
	m, err := image.ReadManifest(s.fs, c.dir)
	if err == nil {
		err = c.matches(m)
	}
	switch {
	case err == nil:
		return infoOf(c, m), m, nil
	case problem.Is(err, problem.Integrity), problem.Is(err, problem.Refused):
		i := infoOf(c, nil)
		i.Damage = err
		return i, nil, nil
	}
	return infoOf(c, nil), nil, err
}

// infoOf puts together what a directory and its manifest, if it can be read, say.
func infoOf(c candidate, m *image.Manifest) Info {
	i := Info{ID: c.id, VM: vmName(c.vmDir), Pinned: c.pinned, Leases: c.leases, Dir: c.dir}
	i.CreatedAt, _ = parseID(c.id)
	if m == nil {
		return i
	}
	i.VM, i.CreatedAt, i.Mode, i.Engine = m.VM, m.CreatedAt, m.Mode, m.Engine
	i.Parent, i.Depth, i.GroupID, i.Epoch = m.Parent, m.Depth, m.GroupID, m.Epoch
	i.RAMBytes, i.StoredBytes, i.Inherited = m.Stats.RAMBytes, m.Stats.StoredBytes, m.InheritedBytes()
	i.Pages, i.ZeroPages, i.CapturedPages = m.Stats.Pages, m.Stats.ZeroPages, m.Stats.CapturedPages
	i.PauseNS = m.Stats.PauseNS
	i.Discarded, _ = strconv.Atoi(m.Machine.Facts[image.FactDiscarded]) // absent: none
	return i
}

// List shows all committed checkpoints, by VM and then oldest first. It reads the
// manifests and nothing else; half-written checkpoints do not appear.
func (s *Store) List(ctx context.Context) ([]Info, error) {
	const op = "list checkpoints"
	vms, err := s.vmDirs(op)
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, vm := range vms {
		list, err := s.candidates(op, vm)
		if err != nil {
			return nil, err
		}
		for _, c := range list {
			if err := ctx.Err(); err != nil {
				return nil, problem.New(problem.Cancelled, op, s.dir, "%w", err)
			}
			if !c.committed {
				continue
			}
			i, _, err := s.info(c)
			if problem.Is(err, problem.NotFound) {
				continue // removed meanwhile
			}
			if err != nil {
				return nil, err
			}
			out = append(out, i)
		}
	}
	return out, nil
}

// File is one file of a checkpoint.
type File struct {
	Name      string
	Bytes     int64
	DiskBytes int64 // allocated; fewer than Bytes if sparse
}

// Inspection is everything there is to say about one checkpoint without reading
// its pages.
type Inspection struct {
	Info
	Manifest *image.Manifest // nil if damaged
	Files    []File
}

// Inspect describes the checkpoint that ref names (see Get).
func (s *Store) Inspect(ctx context.Context, ref string) (Inspection, error) {
	const op = "inspect"
	c, err := s.resolveAny(ctx, op, ref)
	if err != nil {
		return Inspection{}, err
	}
	var in Inspection
	if in.Info, in.Manifest, err = s.info(c); err != nil {
		return in, err
	}
	for _, name := range c.files {
		st, err := s.fs.Stat(filepath.Join(c.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return in, fsys.Problem(op, c.dir, err)
		}
		in.Files = append(in.Files, File{name, st.Bytes, st.DiskBytes})
	}
	return in, nil
}

// resolveID finds the one committed checkpoint an abbreviation means.
func (s *Store) resolveID(ctx context.Context, op, ref string) (candidate, error) {
	vms, err := s.vmDirs(op)
	if err != nil {
		return candidate{}, err
	}
	var found []candidate
	for _, vm := range vms {
		if err := ctx.Err(); err != nil {
			return candidate{}, problem.New(problem.Cancelled, op, ref, "%w", err)
		}
		entries, err := s.fs.ReadDir(filepath.Join(s.dir, vmsName, vm))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return candidate{}, fsys.Problem(op, s.dir, err)
		}
		for _, e := range entries {
			if _, ok := parseID(e.Name); !ok || !e.Dir || !matchesID(e.Name, ref) {
				continue
			}
			if c, err := s.look(op, vm, e.Name); err == nil && c.committed {
				found = append(found, c)
			} else if err != nil && !problem.Is(err, problem.NotFound) {
				return candidate{}, err
			}
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return candidate{}, problem.New(problem.NotFound, op, ref, "no such checkpoint or VM in %s", s.dir).
			WithHint("ckagent ls shows what there is")
	}
	var ids []string
	for _, c := range found[:min(len(found), 4)] {
		ids = append(ids, c.id)
	}
	return candidate{}, problem.New(problem.Usage, op, ref, "means %d checkpoints: %s", len(found), strings.Join(ids, ", ")).
		WithHint("type more of the id")
}

// committedOf lists a VM's committed checkpoints, newest first.
func (s *Store) committedOf(op, vm string) ([]candidate, error) { return s.committedIn(op, vmDir(vm)) }

// committedIn is committedOf for the VM of a directory.
func (s *Store) committedIn(op, dir string) ([]candidate, error) {
	list, err := s.candidates(op, dir)
	if err != nil {
		return nil, err
	}
	var out []candidate
	for _, c := range list {
		if c.committed {
			out = append(out, c)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].id > out[j].id })
	return out, nil
}

// resolveAny takes an id, an abbreviation, or a VM's name for its newest.
func (s *Store) resolveAny(ctx context.Context, op, ref string) (candidate, error) {
	vm, only := strings.CutPrefix(ref, "vm:")
	list, err := s.committedOf(op, vm)
	if err != nil {
		return candidate{}, err
	}
	if len(list) > 0 {
		return list[0], nil
	}
	if only {
		return candidate{}, s.noVM(op, vm)
	}
	return s.resolveID(ctx, op, ref)
}

func (s *Store) noVM(op, vm string) error {
	return problem.New(problem.NotFound, op, vm, "the store %s has no checkpoint of this VM", s.dir).
		WithHint("ckagent ls shows what there is")
}
