package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// VM is a running (or ended) machine.
type VM struct {
	cfg    Config
	pid    int
	argv   []string
	serial string // path
	from   int64  // where this machine's part of the serial log begins
	echo   string
	sql    string
	beats  *Beats
	own    bool // dir is ours to remove
	remove []string
	tb     testing.TB    // nil unless made by Start or Adopt
	done   chan struct{} // closed when the process is gone
	status error         // how it ended; valid once done is closed
	kill   sync.Once

	mu    sync.Mutex
	pidfd int // -1 before the start and after Kill
}

var count atomic.Int64

// Launch starts a machine and, unless cfg says otherwise, waits until its guest
// is ready. ctx bounds the start only: the machine runs until Kill.
func Launch(ctx context.Context, cfg Config) (*VM, error) {
	cfg.fill()
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("vmtest-%d-%d", os.Getpid(), count.Add(1))
	}
	v := &VM{pidfd: -1, done: make(chan struct{})}
	if cfg.Dir == "" {
		dir, err := os.MkdirTemp("", "vmtest-")
		if err != nil {
			return nil, err
		}
		cfg.Dir, v.own = dir, true
	}
	v.cfg, v.serial = cfg, cfg.path("serial")
	l, err := cfg.commandLine(ctx)
	if l.backing != "" {
		v.remove = append(v.remove, l.backing)
	}
	if err != nil {
		v.cleanup()
		return nil, err
	}
	v.argv, v.echo, v.sql, v.beats = append([]string{cfg.Binary}, l.argv...), l.echoAddr, l.sqlAddr, l.beats
	if st, err := os.Stat(v.serial); err == nil {
		v.from = st.Size()
	}
	if err := v.start(); err != nil {
		v.cleanup()
		return nil, problem.New(problem.Failed, "start", cfg.Binary, "%w", err)
	}
	if err := v.awaitUp(ctx); err != nil {
		err = problem.New(problem.Failed, "boot", cfg.Name, "%w\nserial: %s\nqemu: %s", err, lastLines(v.Serial(), 15), v.Messages())
		v.Kill()
		return nil, err
	}
	return v, nil
}

// start runs QEMU from a thread that lives as long as it does: the kernel sends
// the parent-death signal when the *thread* that forked ends.
func (v *VM) start() error {
	log, err := os.OpenFile(v.cfg.path("qemu.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(v.argv[0], v.argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = v.cfg.Dir, log, log
	cmd.Env = append(os.Environ(), v.cfg.QEMU.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, PidFD: &v.pidfd}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err == nil {
			v.status = cmd.Wait()
			close(v.done)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	v.pid = cmd.Process.Pid
	if v.pidfd < 0 {
		v.pidfd, err = unix.PidfdOpen(v.pid, 0)
	}
	return err
}

// awaitUp returns when the QMP socket is there and, if wanted, the guest ready.
func (v *VM) awaitUp(ctx context.Context) error {
	fd, err := v.holdProcess()
	if err != nil {
		return err
	}
	err = awaitFile(ctx, v.QMPPath(), fd)
	unix.Close(fd)
	if err != nil {
		return err
	}
	if !v.cfg.NoWait {
		_, err := v.AwaitSerial(ctx, `^READY `)
		return err
	}
	// The socket is there before the devices are made, which may still fail: the
	// greeting comes from a machine that is complete.
	for {
		m, err := DialMonitor(ctx, v.QMPPath())
		if err == nil {
			return m.Close()
		}
		select {
		case <-v.done:
			return ErrEnded
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond): // between bind and listen it refuses
		}
	}
}

// PID is QEMU's process id.
func (v *VM) PID() int { return v.pid }

// Argv is QEMU's command line, program included.
func (v *VM) Argv() []string { return v.argv }

// Config is what the machine was made from, defaults filled in.
func (v *VM) Config() Config { return v.cfg }

// Dir holds the machine's sockets and logs.
func (v *VM) Dir() string { return v.cfg.Dir }

// QMPPath is QEMU's QMP socket.
func (v *VM) QMPPath() string { return v.cfg.path("qmp.sock") }

// ControlPath is the second QMP socket (Config.Control), free for the test.
func (v *VM) ControlPath() string { return v.cfg.path("control.sock") }

// SerialPath is the file with what the guest wrote to its console.
func (v *VM) SerialPath() string { return v.serial }

// EchoAddr is the host's address of the guest's echo server (Config.Echo).
func (v *VM) EchoAddr() string { return v.echo }

// SQLAddr is the host's address of the guest's database (Config.SQL).
func (v *VM) SQLAddr() string { return v.sql }

// Beats are the heartbeats of the guest (Config.BeatUS), nil without.
func (v *VM) Beats() *Beats { return v.beats }

// Done is closed when QEMU has ended.
func (v *VM) Done() <-chan struct{} { return v.done }

// Alive tells whether QEMU still runs.
func (v *VM) Alive() bool {
	select {
	case <-v.done:
		return false
	default:
		return true
	}
}

// Exit is how QEMU ended (an *exec.ExitError unless all went well); nil while it
// runs and for adopted machines.
func (v *VM) Exit() error {
	if v.Alive() {
		return nil
	}
	return v.status
}

// Messages is the end of what QEMU said on its standard error.
func (v *VM) Messages() string {
	b, _ := os.ReadFile(v.cfg.path("qemu.log"))
	return lastLines(string(bytes.TrimSpace(b)), 15)
}

// Signal sends a signal to QEMU, whoever has its pid by now.
func (v *VM) Signal(sig unix.Signal) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pidfd < 0 {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(v.pidfd, sig, nil, 0)
}

// holdProcess returns a pidfd of the caller's own, so that a Kill meanwhile
// cannot give its number to another file.
func (v *VM) holdProcess() (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pidfd < 0 {
		return -1, ErrEnded
	}
	return unix.FcntlInt(uintptr(v.pidfd), unix.F_DUPFD_CLOEXEC, 0)
}

// Crash kills QEMU like a power failure and returns when it is gone; the log and
// the directory stay. A signal to a process that is gone already is no error.
func (v *VM) Crash() error {
	if err := v.Signal(unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	<-v.done
	return nil
}

// Kill ends the machine if it still runs and removes what it left.
func (v *VM) Kill() {
	v.kill.Do(func() {
		_ = v.Crash() // only ever fails for lack of rights over our own child
		v.cleanup()
	})
}

func (v *VM) cleanup() {
	if v.beats != nil {
		v.beats.Close()
	}
	for _, path := range v.remove {
		os.Remove(path)
	}
	if v.own {
		os.RemoveAll(v.cfg.Dir)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pidfd >= 0 {
		unix.Close(v.pidfd)
		v.pidfd = -1
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Adopt takes over a machine started by somebody else, such as a restored one.
// serial is its console log, of which only what comes after byte from counts.
// The returned VM owns the process: Kill kills it.
func Adopt(pid int, qmp, serial string, from int64) (*VM, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, problem.New(problem.NotFound, "adopt", fmt.Sprintf("pid %d", pid), "%w", err)
	}
	v := &VM{pid: pid, pidfd: fd, serial: serial, from: from, done: make(chan struct{})}
	v.cfg = Config{Dir: filepath.Dir(qmp)}
	if argv, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil {
		v.argv = strings.Split(strings.TrimRight(string(argv), "\x00"), "\x00")
	}
	own, err := v.holdProcess()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	go func() {
		v.status = awaitProcess(own)
		unix.Close(own)
		close(v.done)
	}()
	return v, nil
}

// awaitProcess returns when the process of a pidfd has ended.
func awaitProcess(pidfd int) error {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(p, -1); n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
			return err
		}
	}
}

// defaultTimeout is for a boot on a machine that is busy with other tests.
const defaultTimeout = 90 * time.Second
