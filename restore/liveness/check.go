package liveness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/vm"
)

// Subject is the VM in question.
type Subject struct {
	// The checkpointed process, as far as it was recorded; PID 0 if not.
	PID        int
	StartTicks uint64
	BootID     string

	Name    string // of -name; empty if it had none
	UUID    string
	Sockets []string // control sockets it listened on, absolute
	Images  []string // files it had open for writing, absolute
}

// Doubt is one reason to think that the VM lives.
type Doubt struct {
	PID  int    `json:"pid,omitempty"` // 0: not known
	What string `json:"what"`
}

func (d Doubt) String() string {
	if d.PID == 0 {
		return d.What
	}
	return fmt.Sprintf("pid %d %s", d.PID, d.What)
}

// maxCmdline bounds what is read of a process's arguments.
const maxCmdline = 4 << 20

// Check returns every doubt. An error means that the host could not be looked at,
// which is a doubt of its own: the caller must not start the VM then.
func Check(ctx context.Context, s Subject) ([]Doubt, error) {
	var doubts []Doubt
	if d, ok := s.recordedProcess(); ok {
		doubts = append(doubts, d)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		exe, err := os.Readlink("/proc/" + e.Name() + "/exe")
		if errors.Is(err, os.ErrPermission) && qemuComm(pid) {
			doubts = append(doubts, Doubt{PID: pid, What: "may be it: only root can look at that QEMU"})
			continue
		}
		if err != nil || !vm.AllowedBinary(strings.TrimSuffix(exe, " (deleted)")) {
			continue // a kernel thread, gone, or not QEMU
		}
		if slices.ContainsFunc(doubts, func(d Doubt) bool { return d.PID == pid }) {
			continue
		}
		if what := s.resembles(pid); what != "" {
			doubts = append(doubts, Doubt{PID: pid, What: what})
		}
	}
	for _, path := range s.Images {
		held, err := Locked(path)
		if err != nil {
			return nil, fmt.Errorf("look at the lock of %s: %w", path, err)
		}
		if held {
			doubts = append(doubts, Doubt{What: "somebody holds the lock of the image " + path})
		}
	}
	return doubts, nil
}

// recordedProcess looks for the very process that was checkpointed.
func (s Subject) recordedProcess() (Doubt, bool) {
	if s.PID <= 0 {
		return Doubt{}, false
	}
	boot, err := BootID()
	if err != nil || s.BootID != "" && boot != s.BootID {
		return Doubt{}, false // another boot, another set of processes
	}
	// Who it is can be told of any process, whether or not we may look at the rest of it.
	p, err := procstat.Read(s.PID)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return Doubt{}, false
	case err != nil:
		return Doubt{PID: s.PID, What: "may be the process that was checkpointed: " + err.Error()}, true
	case p.StartTicks != s.StartTicks || p.Ended() || p.Exiting(): // its guest runs no more
		return Doubt{}, false
	}
	return Doubt{PID: s.PID, What: "is the process that was checkpointed"}, true
}

// resembles says what a QEMU process has in common with the subject.
func (s Subject) resembles(pid int) string {
	raw, err := readCmdline(pid)
	if err == nil && len(raw) == 0 {
		return "" // a zombie: its memory is gone
	}
	args := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	opts, err := cmdline.Parse(args[1:])
	if err != nil {
		opts = nil // it does not say what it is; what it has open does
	}
	cwd, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/cwd")
	abs := func(p string) string {
		if p == "" || filepath.IsAbs(p) {
			return filepath.Clean(p)
		}
		return filepath.Join(cwd, p)
	}
	for _, o := range opts {
		kv, err := o.KeyVal()
		if err != nil {
			kv = &cmdline.KeyVal{}
		}
		switch o.Name {
		case "name":
			if n, _ := kv.Get("guest"); s.Name != "" && n == s.Name {
				return "runs a VM of the name " + s.Name
			}
		case "uuid":
			if s.UUID != "" && strings.EqualFold(o.Value, s.UUID) {
				return "runs a VM with the UUID " + s.UUID
			}
		case "chardev":
			if p, ok := kv.Get("path"); ok && slices.Contains(s.Sockets, abs(p)) {
				return "listens on its socket " + abs(p)
			}
		case "qmp", "qmp-pretty", "monitor", "serial":
			if p, ok := strings.CutPrefix(strings.TrimPrefix(o.Value, "mon:"), "unix:"); ok {
				if kv, err := cmdline.ParseKeyVal(p, "path"); err == nil {
					p, _ = kv.Get("path")
				}
				if slices.Contains(s.Sockets, abs(p)) {
					return "listens on its socket " + abs(p)
				}
			}
		}
	}
	return s.opened(pid)
}

// opened says which of the subject's images a process has open for writing.
func (s Subject) opened(pid int) string {
	if len(s.Images) == 0 {
		return ""
	}
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		st, err := os.Stat(dir + "/" + fd.Name())
		if err != nil {
			continue
		}
		for _, img := range s.Images {
			is, err := os.Stat(img)
			if err != nil || !os.SameFile(st, is) || !writable(pid, fd.Name()) {
				continue
			}
			return "has its image " + img + " open"
		}
	}
	return ""
}

// writable reads the access mode of another process's descriptor.
func writable(pid int, fd string) bool {
	info, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/fdinfo/" + fd)
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(info)) {
		if flags, ok := strings.CutPrefix(line, "flags:"); ok {
			mode, err := strconv.ParseUint(strings.TrimSpace(flags), 8, 32)
			return err != nil || mode&3 != 0
		}
	}
	return true
}

// qemuComm goes by the name of a process that may not be looked at further.
func qemuComm(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	name := string(bytes.TrimSpace(b))
	return err == nil && (strings.HasPrefix(name, "qemu") || name == "kvm")
}

func readCmdline(pid int) ([]byte, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return nil, err
	}
	if len(raw) > maxCmdline {
		return nil, errors.New("command line too long")
	}
	return raw, nil
}

// BootID names this boot of the host.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return string(bytes.TrimSpace(b)), nil
}
