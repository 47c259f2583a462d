package procstat

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Stat is what ckagent uses of /proc/PID/stat.
type Stat struct {
	PID, PPID  int
	Comm       string // the name of the first thread, at most 15 bytes of anything
	State      byte   // R S D T t Z X I: of the first thread, which may end before the others
	Terminal   int    // device number of its controlling terminal; 0: none
	Flags      uint64 // PF_* of include/linux/sched.h
	StartTicks uint64 // clock ticks since boot
	Processor  int    // that the first thread runs on or ran on last
}

// Fields as numbered in proc(5), as indices of what follows the name.
const (
	stateField     = 3 - firstField
	ppidField      = 4 - firstField
	ttyField       = 7 - firstField
	flagsField     = 9 - firstField
	startField     = 22 - firstField
	processorField = 39 - firstField
	firstField     = 3
)

const (
	pfExiting      = 0x4
	pfKernelThread = 0x200000
)

// Ended reports whether nothing is left of the process but its exit status.
func (s Stat) Ended() bool { return s.State == 'Z' || s.State == 'X' }

// Exiting reports whether the first thread has ended or is about to.
func (s Stat) Exiting() bool { return s.Ended() || s.Flags&pfExiting != 0 }

// Kernel reports whether it is a thread of the kernel's, which never ran a program.
func (s Stat) Kernel() bool { return s.Flags&pfKernelThread != 0 }

// Stopped reports whether a signal or a tracer stopped the first thread.
func (s Stat) Stopped() bool { return s.State == 'T' || s.State == 't' }

// Read reads the entry of a process, or of a thread by its own id.
func Read(pid int) (Stat, error) {
	path := "/proc/" + strconv.Itoa(pid) + "/stat"
	b, err := os.ReadFile(path)
	if err != nil {
		return Stat{}, err
	}
	s, err := Parse(b)
	if err != nil {
		return Stat{}, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// Parse decodes one. The name may hold blanks and parentheses, so the fields are
// counted from the last ')'.
func Parse(b []byte) (Stat, error) {
	malformed := func(what string) (Stat, error) {
		return Stat{}, fmt.Errorf("no %s in stat %.80q", what, b)
	}
	open, closed := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || closed < open {
		return malformed("name")
	}
	s := Stat{Comm: string(b[open+1 : closed])}
	f := strings.Fields(string(b[closed+1:]))
	if len(f) <= processorField || len(f[stateField]) != 1 {
		return malformed("processor")
	}
	s.State = f[stateField][0]
	var err error
	if s.PID, err = strconv.Atoi(strings.TrimSpace(string(b[:open]))); err != nil {
		return malformed("pid")
	}
	if s.PPID, err = strconv.Atoi(f[ppidField]); err != nil {
		return malformed("parent")
	}
	if s.Terminal, err = strconv.Atoi(f[ttyField]); err != nil {
		return malformed("terminal")
	}
	if s.Flags, err = strconv.ParseUint(f[flagsField], 10, 64); err != nil {
		return malformed("flags")
	}
	if s.StartTicks, err = strconv.ParseUint(f[startField], 10, 64); err != nil {
		return malformed("start time")
	}
	if s.Processor, err = strconv.Atoi(f[processorField]); err != nil {
		return malformed("processor")
	}
	return s, nil
}
