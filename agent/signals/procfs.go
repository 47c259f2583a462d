package signals

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/vm"
)

// schedTimes are what the scheduler accounted of a thread.
type schedTimes struct{ run, wait time.Duration }

func readSched(pid, tid int) (t schedTimes) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, tid))
	if err != nil {
		return t
	}
	var run, wait int64
	if _, err := fmt.Sscan(string(b), &run, &wait); err == nil {
		t = schedTimes{time.Duration(run), time.Duration(wait)}
	}
	return t
}

// writeBytes is what a process caused to be written, as the block layer sees it.
func writeBytes(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("write_bytes:")); ok {
			n, _ := strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 64) // 0 if it is none
			return n
		}
	}
	return 0
}

// What ckagent does with a VM.
const (
	StateUnprotected   = "unprotected"   // nobody holds it
	StateAttached      = "attached"      // ckagent attach, between checkpoints or in one
	StateCheckpointing = "checkpointing" // ckagent checkpoint
	StateMeasuring     = "measuring"     // ckagent dirty-rate, or a window of ours
	StateHeld          = "held"          // somebody else's lock
)

// checkpointState tells by the VM's lock who works on it: the lock file names the
// holder, the holder's command line its verb.
func checkpointState(p *vm.Process) (state string, holder int) {
	b, err := os.ReadFile(filepath.Join(vm.LockDir, fmt.Sprintf("%d-%d.lock", p.PID, p.StartTicks)))
	if err != nil {
		return StateUnprotected, 0
	}
	if _, err := fmt.Sscanf(string(b), "pid %d", &holder); err != nil {
		return StateUnprotected, 0
	}
	if holder == os.Getpid() {
		return StateMeasuring, holder
	}
	argv := arguments(holder)
	if argv == nil {
		return StateUnprotected, 0 // it died: the file is all that is left
	}
	for _, a := range argv[1:] {
		switch a {
		case "attach", "daemon":
			return StateAttached, holder
		case "checkpoint":
			return StateCheckpointing, holder
		case "dirty-rate", "top":
			return StateMeasuring, holder
		}
	}
	return StateHeld, holder
}

func arguments(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// nameOf is the VM's name by QEMU's command line, "" without one.
func nameOf(argv []string) (name string) {
	for i, a := range argv {
		if (a == "-name" || a == "--name") && i+1 < len(argv) {
			name, _, _ = strings.Cut(argv[i+1], ",")
			name = strings.TrimPrefix(name, "guest=")
		}
	}
	return name
}
