package pager

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// Files in the run directory, all 0600.
const (
	stateFile = "pager.json" // configuration, phase, damage: written by the starter, then by the worker
	seatsFile = "pager.pids" // who they were when it was written: for Resume by hand
	logFile   = "pager.log"  // what the processes had to say
	lockFile  = "pager.lock" // one Resume at a time
)

const (
	stateSchema   = "ckagent.pager/1"
	maxStateBytes = 16 << 20
)

// opPageIn is the operation of what fails in a pager.
const opPageIn = "page in"

// state is pager.json.
type state struct {
	Schema string        `json:"schema"`
	Phase  string        `json:"phase"`
	Config Config        `json:"config"`
	Error  *problem.Wire `json:"error,omitempty"`
	Damage *damage       `json:"damage,omitempty"`
	Final  *Stats        `json:"final,omitempty"`
	Notes  []string      `json:"notes,omitempty"` // what could not be done, though nothing was lost
}

// damage says which pages cannot be had.
type damage struct {
	Pages uint64       `json:"pages"`
	Runs  []Run        `json:"runs"` // the first of them, by block of the source
	First problem.Wire `json:"first"`
}

// writeFile replaces a file of the run directory in one step. It is not synced: it
// matters only as long as the host runs.
func writeFile(dir, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	f, err := os.CreateTemp(dir, name+".*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	_, err = f.Write(append(b, '\n'))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func readFile(dir, name string, v any) error {
	path := filepath.Join(dir, name)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() > maxStateBytes {
		return fmt.Errorf("%s: %d bytes are too many", path, st.Size())
	}
	if err := json.NewDecoder(f).Decode(v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func loadState(dir string) (*state, error) {
	s := &state{}
	if err := readFile(dir, stateFile, s); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, problem.New(problem.NotFound, "resume pager", dir, "no pager was started there")
		}
		return nil, problem.New(problem.Failed, "resume pager", dir, "%w", err)
	}
	if s.Schema != stateSchema {
		return nil, problem.New(problem.Refused, "resume pager", dir, "state of schema %q, %q expected", s.Schema, stateSchema)
	}
	s.Config.RunDir = dir
	if err := s.Config.resolve(); err != nil {
		return nil, problem.New(problem.Failed, "resume pager", dir, "state does not make sense: %w", err)
	}
	return s, nil
}

// seats is pager.pids.
type seats struct {
	Worker     occupant `json:"worker"`
	Supervisor occupant `json:"supervisor"`
}

type occupant struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// pidBits is what a pid takes (PID_MAX_LIMIT is 1<<22); the rest is the start.
const pidBits = 22

func (o occupant) pack() uint64 { return o.Start<<pidBits | uint64(o.PID)&(1<<pidBits-1) }

func unpack(v uint64) occupant { return occupant{int(v & (1<<pidBits - 1)), v >> pidBits} }

func (s *seat) occupant() occupant { return unpack(s.who.Load()) }

// claim puts now in the place of old. The new process and who started it both do, in
// any order; false means that somebody else was faster and now has no seat.
func (s *seat) claim(old, now occupant, beatNS int64) bool {
	if s.who.Load() == old.pack() {
		s.beatNS.Store(beatNS)
	}
	if s.who.CompareAndSwap(old.pack(), now.pack()) {
		s.spawns.Add(1)
		return true
	}
	return s.occupant() == now
}

// myself is this process as an occupant.
func myself() (occupant, error) {
	s, err := procstat.Read(os.Getpid())
	return occupant{os.Getpid(), s.StartTicks}, err
}

// exists reports whether this very process has an entry in /proc; ended or not.
func (o occupant) exists() bool {
	s, err := procstat.Read(o.PID)
	return err == nil && s.StartTicks == o.Start
}

// noteSeats writes down who is who. Both processes do; the last one wins, and a
// name that is one step old still leads to somebody who knows.
func noteSeats(dir string, c *control) error {
	return writeFile(dir, seatsFile, seats{c.worker.occupant(), c.supervisor.occupant()})
}

// cleanUp removes our files, and the directory if nothing else is in it.
func cleanUp(dir string) {
	removeFiles(dir)
	_ = os.Remove(dir)
}

func removeFiles(dir string) {
	for _, name := range []string{seatsFile, stateFile, logFile, lockFile} {
		_ = os.Remove(filepath.Join(dir, name))
	}
}
