package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"golang.org/x/sys/unix"
)

// Process is a QEMU process as it was when opened, held by a pidfd: as long as
// the pidfd has not become readable the pid cannot have been given to another
// process. Identity fields are read once and never change.
type Process struct {
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"` // field 22 of /proc/PID/stat, clock ticks since boot
	Comm       string `json:"comm"`
	PPID       int    `json:"ppid"`

	Argv       []string `json:"-"` // as given, secrets included: never print or store it; see Describe
	Exe        string   `json:"exe"`
	ExeDeleted bool     `json:"exe_deleted"` // the binary was replaced or removed since it started
	Cwd        string   `json:"cwd"`
	Root       string   `json:"root"`

	UID    int   `json:"uid"` // effective
	GID    int   `json:"gid"` // effective
	Groups []int `json:"groups,omitempty"`

	NoNewPrivs bool `json:"no_new_privs"`
	Seccomp    int  `json:"seccomp"` // 0 none, 1 strict, 2 filter

	Namespaces map[string]uint64 `json:"namespaces"` // kind -> inode
	Cgroups    []Cgroup          `json:"cgroups"`
	Limits     map[string]Limit  `json:"limits"` // by the kernel's names: "Max locked memory", ...

	pidfd *os.File

	mu     sync.Mutex
	closed bool
	done   chan struct{} // non-nil once Done was called
	stop   *os.File      // eventfd that ends the watcher
	joined chan struct{} // closed when the watcher has returned
}

// qemuNames are the base names of binaries that are treated as QEMU. The list is
// short on purpose: restore starts nothing else.
var qemuNames = map[string]bool{
	"qemu-system-x86_64":         true,
	"qemu-system-amd64":          true,
	"qemu-system-i386":           true,
	"qemu-system-x86_64-microvm": true,
	"qemu-kvm":                   true,
	"kvm":                        true,
}

// AllowedBinary reports whether a path names a QEMU binary this tool will attach
// to and start again: by base name, after removal of a wrapper's decoration
// (NixOS: ".qemu-system-x86_64-wrapped").
func AllowedBinary(path string) bool {
	base := filepath.Base(path)
	if inner, ok := strings.CutPrefix(base, "."); ok {
		base = strings.TrimSuffix(inner, "-wrapped")
	}
	return qemuNames[base]
}

// OpenProcess takes hold of a QEMU process. problem.NotFound when there is none
// with this pid (or only a zombie), problem.Refused when it is not QEMU or may
// not be looked at.
func OpenProcess(pid int) (*Process, error) {
	p, err := openAny(pid)
	if err != nil {
		return nil, err
	}
	if !AllowedBinary(p.Exe) {
		exe := p.Exe
		p.Close()
		return nil, problem.New(problem.Refused, "open", object(pid), "not a QEMU system emulator: it runs %s", exe).
			WithHint("give the pid of a qemu-system-x86_64 process; `pgrep -a qemu` lists them")
	}
	return p, nil
}

// OpenProcessAs is OpenProcess for a process met before: a different start time
// means that the pid has been recycled, and is problem.NotFound.
func OpenProcessAs(pid int, startTicks uint64) (*Process, error) {
	return openAs(pid, startTicks, OpenProcess)
}

func openAs(pid int, startTicks uint64, open func(int) (*Process, error)) (*Process, error) {
	p, err := open(pid)
	if err != nil {
		return nil, err
	}
	if p.StartTicks != startTicks {
		got := p.StartTicks
		p.Close()
		return nil, problem.New(problem.NotFound, "open", object(pid),
			"the pid was recycled: started at tick %d, expected %d", got, startTicks)
	}
	return p, nil
}

func object(pid int) string { return "pid " + strconv.Itoa(pid) }

// openAny opens any process, QEMU or not.
func openAny(pid int) (*Process, error) {
	if pid <= 0 {
		return nil, problem.New(problem.NotFound, "open", object(pid), "no such process").WithHint("a pid is a positive number")
	}
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, problem.New(problem.NotFound, "open", object(pid), "no such process: %w", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		// The number belongs to a thread that does not lead its group.
		return nil, problem.New(problem.NotFound, "open", object(pid), "is a thread, not a process: %w", err).
			WithHint("give the process id (Tgid in /proc/%d/status)", pid)
	case err != nil:
		return nil, problem.New(problem.Failed, "pidfd_open", object(pid), "%w", err)
	}
	p := &Process{PID: pid, pidfd: os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))}
	if err := p.read(); err != nil {
		p.Close()
		if errors.Is(err, errKernelThread) {
			return nil, problem.New(problem.Refused, "open", object(pid), "not QEMU: %s is a kernel thread, which runs no program", p.Comm).
				WithHint("give the pid of a qemu-system-x86_64 process; `pgrep -a qemu` lists them")
		}
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return nil, problem.New(problem.NotFound, "open", object(pid), "the process went away: %w", err)
		}
		if errors.Is(err, os.ErrPermission) {
			return nil, problem.New(problem.Refused, "open", object(pid), "%w", err).
				WithHint("run as root, or with CAP_SYS_PTRACE, in the host's pid namespace")
		}
		return nil, problem.New(problem.Failed, "open", object(pid), "%w", err)
	}
	// Everything above was read by number; that it all spoke of the process the
	// pidfd holds is known only if that one is still there now.
	if !p.Alive() {
		p.Close()
		return nil, problem.New(problem.NotFound, "open", object(pid), "the process has exited")
	}
	return p, nil
}

var errKernelThread = errors.New("no executable: a kernel thread")

// read fills the identity from /proc.
func (p *Process) read() error {
	dir := "/proc/" + strconv.Itoa(p.PID)
	st, err := procstat.Read(p.PID)
	if err != nil {
		return err
	}
	if st.PID != p.PID {
		return fmt.Errorf("/proc shows pid %d for %d: another pid namespace", st.PID, p.PID)
	}
	p.Comm, p.PPID, p.StartTicks = st.Comm, st.PPID, st.StartTicks
	if st.Kernel() {
		return errKernelThread
	}
	raw, err := readBounded(dir+"/status", 1<<20)
	if err != nil {
		return err
	}
	s, err := parseStatus(raw)
	if err != nil {
		return err
	}
	p.UID, p.GID, p.Groups, p.NoNewPrivs, p.Seccomp = s.uid, s.gid, s.groups, s.noNewPrivs, s.seccomp
	// A process that is exiting has let go of its program a while before it is dead.
	if p.Exe, err = os.Readlink(dir + "/exe"); err != nil {
		return err
	}
	if name, ok := strings.CutSuffix(p.Exe, " (deleted)"); ok {
		p.Exe, p.ExeDeleted = name, true
	}
	if p.Cwd, err = os.Readlink(dir + "/cwd"); err != nil {
		return err
	}
	if p.Root, err = os.Readlink(dir + "/root"); err != nil {
		return err
	}
	if raw, err = readBounded(dir+"/cmdline", 8<<20); err != nil {
		return err
	}
	p.Argv = parseCmdline(raw)
	if raw, err = readBounded(dir+"/cgroup", 1<<20); err != nil {
		return err
	}
	if p.Cgroups, err = parseCgroups(raw); err != nil {
		return err
	}
	if raw, err = readBounded(dir+"/limits", 64<<10); err != nil {
		return err
	}
	if p.Limits, err = parseLimits(raw); err != nil {
		return err
	}
	p.Namespaces, err = readNamespaces(dir + "/ns")
	return err
}

// String names the process for people.
func (p *Process) String() string { return object(p.PID) }

// Path is a file of this process under /proc, for instance Path("pagemap").
func (p *Process) Path(name string) string { return "/proc/" + strconv.Itoa(p.PID) + "/" + name }

// Outside is the path of one of its files, seen from here: by the same name where both
// see the same file.
func (p *Process) Outside(path string) string {
	if !filepath.IsAbs(path) {
		return p.Path("cwd") + "/" + path
	}
	theirs := p.Path("root") + path
	a, err := os.Stat(path)
	if err != nil {
		return theirs
	}
	if b, err := os.Stat(theirs); err == nil && os.SameFile(a, b) {
		return path
	}
	return theirs
}

// PidFD is the pidfd; it belongs to the Process and is closed with it.
func (p *Process) PidFD() *os.File { return p.pidfd }

// Alive reports whether the process has not exited (a zombie has).
func (p *Process) Alive() bool {
	alive := false
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	_ = conn.Control(func(fd uintptr) {
		alive = !readable(int(fd))
	})
	return alive
}

// Check is nil while the process lives, else problem.NotFound.
func (p *Process) Check() error {
	if p.Alive() {
		return nil
	}
	return problem.New(problem.NotFound, "check", p.String(), "the process has exited")
}

func readable(fd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n > 0
	}
}

// Wait returns nil when the process has exited, or ctx's error.
func (p *Process) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	wake, err := newEventFD()
	if err != nil {
		return err
	}
	defer wake.Close()
	// The callback must not outlive wake: when it has started, let it end.
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(fired); ringEventFD(wake) })
	defer func() {
		if !stop() {
			<-fired
		}
	}()
	exited, err := p.pollUntil(wake)
	if err != nil {
		return err
	}
	if exited {
		return nil
	}
	return ctx.Err()
}

// pollUntil blocks until the process exits (true) or wake is rung (false).
func (p *Process) pollUntil(wake *os.File) (exited bool, err error) {
	pc, err := p.pidfd.SyscallConn()
	if err != nil {
		return false, err
	}
	wc, err := wake.SyscallConn()
	if err != nil {
		return false, err
	}
	var perr error
	// Control pins both descriptors, so that neither number can be reused
	// while poll looks at it.
	cerr := pc.Control(func(pfd uintptr) {
		perr = wc.Control(func(wfd uintptr) {
			fds := []unix.PollFd{{Fd: int32(pfd), Events: unix.POLLIN}, {Fd: int32(wfd), Events: unix.POLLIN}}
			for {
				if _, err = unix.Poll(fds, -1); errors.Is(err, unix.EINTR) {
					continue
				}
				exited = fds[0].Revents != 0
				return
			}
		})
	})
	return exited, errors.Join(cerr, perr, err)
}

// Done is closed when the process exits. The watcher behind it belongs to the
// Process and is joined by Close, after which an unclosed Done stays open.
func (p *Process) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done != nil {
		return p.done
	}
	p.done = make(chan struct{})
	if p.closed {
		return p.done
	}
	wake, err := newEventFD()
	if err != nil {
		// Out of descriptors: the caller is told that the process is gone rather
		// than left waiting for ever.
		close(p.done)
		return p.done
	}
	p.stop, p.joined = wake, make(chan struct{})
	go func(done, joined chan struct{}) {
		defer close(joined)
		if exited, err := p.pollUntil(wake); exited || err != nil {
			close(done)
		}
	}(p.done, p.joined)
	return p.done
}

// Close lets go of the process. It never signals it.
func (p *Process) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	stop, joined := p.stop, p.joined
	p.mu.Unlock()
	if stop != nil {
		ringEventFD(stop)
		<-joined
		stop.Close()
	}
	return p.pidfd.Close()
}

func newEventFD() (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return os.NewFile(uintptr(fd), "eventfd"), nil
}

func ringEventFD(f *os.File) { _, _ = f.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) }
