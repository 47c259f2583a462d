package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// Record is a VM that is to be protected, as it is kept on disk.
type Record struct {
	Schema     string
	Name       string
	PID        int
	StartTicks uint64 // of the process, in the host's boot that BootID names
	BootID     string
	Since      time.Time
	Proven     bool // it has had a checkpoint
	Spec       *apipb.Spec
	Ending     *apipb.Ending // of a VM that is gone; nil: it is not, as far as is known
	Rehearsal  *apipb.Rehearsal
}

const recordSchema = "ckagent.protected/1"

// recordFile is a Record as JSON: what is of the wire's form is kept in that.
type recordFile struct {
	Schema     string          `json:"schema"`
	Name       string          `json:"vm"`
	PID        int             `json:"qemu_pid"`
	StartTicks uint64          `json:"start_ticks"`
	BootID     string          `json:"boot_id"`
	Since      time.Time       `json:"since"`
	Proven     bool            `json:"proven"`
	Spec       json.RawMessage `json:"spec"`
	Ending     json.RawMessage `json:"ending,omitempty"`
	Rehearsal  json.RawMessage `json:"rehearsal,omitempty"`
}

// BootID names this boot of the host.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // no /proc: no process is found either
	}
	return strings.TrimSpace(string(b))
}

// Alive reports whether the VM's process is there, as far as this boot knows it. It says
// no only if that is certain: a VM that is written down as gone is protected no longer,
// and a process that has too many open files can read nothing about any other.
func (r Record) Alive() bool {
	if boot := BootID(); boot != "" && r.BootID != boot {
		return false
	}
	st, err := procstat.Read(r.PID)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH)
	}
	return st.StartTicks == r.StartTicks && !st.Ended()
}

// Adopt makes another process the VM's, which was brought back.
func (r *Record) Adopt(pid int) {
	r.PID, r.BootID, r.Ending = pid, BootID(), nil
	if st, err := procstat.Read(pid); err == nil {
		r.StartTicks = st.StartTicks
	}
	r.Spec = proto.CloneOf(r.Spec)
	r.Spec.Qmp, r.Spec.Name = "", r.Name // its monitor is another
}

// Leave puts a record where the next daemon finds it. problem.Busy while one runs, which
// has to be asked instead.
func Leave(dir string, r Record) error {
	s, err := OpenState(dir)
	if err != nil {
		return err
	}
	return errors.Join(s.Save(r), s.Close())
}

// State is a directory of records. One process has it at a time.
type State struct {
	dir  string
	lock *os.File
}

// OpenState takes a state directory. problem.Busy while another process has it.
func OpenState(dir string) (*State, error) {
	const op = "open state"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, problem.New(problem.Failed, op, dir, "%w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, problem.New(problem.Failed, op, dir, "%w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		code := problem.Failed
		if errors.Is(err, unix.EWOULDBLOCK) {
			code = problem.Busy
		}
		return nil, errors.Join(problem.New(code, op, dir, "%w", err).WithHint("one ckagent daemon runs on it at a time"), f.Close())
	}
	// Left by one that was killed while it wrote. Records have an end to their names.
	stale, err := filesIn(dir, ".new-*[0-9]")
	for _, path := range stale {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, errors.Join(problem.New(problem.Failed, op, dir, "%w", err), f.Close())
	}
	return &State{dir, f}, nil
}

// Close gives the directory back.
func (s *State) Close() error { return s.lock.Close() }

func (s *State) path(name string) string { return filepath.Join(s.dir, image.FileName(name)+".json") }

// Save keeps a record, durably.
func (s *State) Save(r Record) (err error) {
	const op = "save state"
	f := recordFile{Schema: recordSchema, Name: r.Name, PID: r.PID, StartTicks: r.StartTicks, BootID: r.BootID, Since: r.Since, Proven: r.Proven}
	if f.Spec, err = protojson.Marshal(r.Spec); err != nil {
		return problem.New(problem.Failed, op, "VM "+r.Name, "%w", err)
	}
	if r.Ending != nil {
		if f.Ending, err = protojson.Marshal(api.Readable(r.Ending)); err != nil {
			return problem.New(problem.Failed, op, "VM "+r.Name, "%w", err)
		}
	}
	if r.Rehearsal != nil {
		if f.Rehearsal, err = protojson.Marshal(api.Readable(r.Rehearsal)); err != nil {
			return problem.New(problem.Failed, op, "VM "+r.Name, "%w", err)
		}
	}
	text, err := json.MarshalIndent(f, "", "  ")
	if err == nil {
		err = s.replace(s.path(r.Name), append(text, '\n'))
	}
	if err != nil {
		return problem.New(problem.Store, op, s.path(r.Name), "%w", err)
	}
	return nil
}

// replace writes a file so that it is there whole or as it was, also after a power loss.
func (s *State) replace(path string, text []byte) (err error) {
	f, err := os.CreateTemp(s.dir, ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, werr := f.Write(text)
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return s.sync()
}

func (s *State) sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Remove forgets a VM.
func (s *State) Remove(name string) error {
	err := os.Remove(s.path(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err = errors.Join(err, s.sync()); err != nil {
		return problem.New(problem.Store, "forget", "VM "+name, "%w", err)
	}
	return nil
}

// Read lists the records.
func (s *State) Read() ([]Record, error) { return ReadRecords(s.dir) }

// ReadRecords lists the records of a directory, by name, whoever has it. A file that
// cannot be read is an error beside the others: one VM's damage is not to leave the rest
// unprotected.
func ReadRecords(dir string) ([]Record, error) {
	const op = "read state"
	files, err := filesIn(dir, "*.json")
	if err != nil {
		return nil, problem.New(problem.Failed, op, dir, "%w", err)
	}
	var list []Record
	var errs []error
	for _, path := range files {
		r, err := readRecord(path)
		if err != nil {
			errs = append(errs, problem.New(problem.Integrity, op, path, "%w", err).WithHint("attach to the VM again; then remove the file"))
			continue
		}
		list = append(list, r)
	}
	return list, errors.Join(errs...)
}

// filesIn lists the files of a directory whose names match a pattern, by name; none if it
// is not there. Unlike filepath.Glob it says that a directory cannot be read, and takes no
// part of the directory's own name for a pattern.
func filesIn(dir, pattern string) (paths []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		ok, err := filepath.Match(pattern, e.Name())
		if err != nil {
			return nil, err
		}
		if ok {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	return paths, nil
}

const maxRecordBytes = 1 << 20

func readRecord(path string) (Record, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Record{}, err
	}
	if info.Size() > maxRecordBytes {
		return Record{}, fmt.Errorf("%d bytes are no record", info.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return Record{}, err
	}
	var f recordFile
	if err := json.Unmarshal(text, &f); err != nil {
		return Record{}, err
	}
	if f.Schema != recordSchema || f.Name == "" || f.PID <= 0 {
		return Record{}, fmt.Errorf("schema %q, VM %q, pid %d", f.Schema, f.Name, f.PID)
	}
	r := Record{Schema: f.Schema, Name: f.Name, PID: f.PID, StartTicks: f.StartTicks, BootID: f.BootID, Since: f.Since, Proven: f.Proven, Spec: &apipb.Spec{}}
	if err := protojson.Unmarshal(f.Spec, r.Spec); err != nil {
		return Record{}, err
	}
	if len(f.Ending) > 0 {
		r.Ending = &apipb.Ending{}
		if err := protojson.Unmarshal(f.Ending, r.Ending); err != nil {
			return Record{}, err
		}
	}
	if len(f.Rehearsal) > 0 {
		r.Rehearsal = &apipb.Rehearsal{}
		if err := protojson.Unmarshal(f.Rehearsal, r.Rehearsal); err != nil {
			return Record{}, err
		}
	}
	return r, nil
}
