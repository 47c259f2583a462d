package plugins

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
)

// Limits are what a program may use. Processor time is for a control group to limit:
// Host.Confine.
type Limits struct {
	DataBytes uint64 // private writable memory
	FileBytes uint64 // of any file it writes
	Files     uint64 // open at once
}

// DefaultLimits are generous for anything that decides about intervals.
var DefaultLimits = Limits{DataBytes: 1 << 30, FileBytes: 16 << 20, Files: 256}

// lastWords is how long the output of a program that ended is read on, should a
// process that it left behind hold it open.
const lastWords = 200 * time.Millisecond

// process is a program that runs in a process group of its own, and what go-plugin
// knows of it.
type process struct {
	cmd     *exec.Cmd
	limits  Limits
	confine func(pid int) (release func())

	stdout, stderr *os.File      // our ends
	ended          chan struct{} // closed when it was reaped, its group killed
	started        chan error    // of the goroutine that starts and reaps it

	mu     sync.Mutex
	killed bool // from then on it is not started
	begun  bool // ended will be closed
	alive  bool // its pid is its own
	status error
}

var _ runner.Runner = (*process)(nil)

func newProcess(path string, limits Limits, confine func(int) func()) *process {
	return &process{limits: limits, confine: confine, ended: make(chan struct{}), started: make(chan error, 1),
		cmd: &exec.Cmd{Path: path, Args: []string{path}, Dir: "/",
			// The kernel ends it when the thread that started it does.
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}}}
}

// Start starts it. Without standard input, and with the environment it was given.
func (p *process) Start(context.Context) error {
	p.mu.Lock()
	p.begun = true
	p.mu.Unlock()
	outs, err := pipes(2)
	if err != nil {
		close(p.ended)
		return err
	}
	p.stdout, p.stderr = outs[0].r, outs[1].r
	p.cmd.Stdout, p.cmd.Stderr = outs[0].w, outs[1].w
	go p.live()
	err = <-p.started
	for _, o := range outs {
		_ = o.w.Close() // the program has its own
	}
	if err != nil {
		_ = p.stdout.Close()
		_ = p.stderr.Close()
	}
	return err
}

type pipe struct{ r, w *os.File }

func pipes(n int) (list []pipe, err error) {
	for range n {
		r, w, err := os.Pipe()
		if err != nil {
			for _, p := range list {
				_ = p.r.Close()
				_ = p.w.Close()
			}
			return nil, err
		}
		list = append(list, pipe{r, w})
	}
	return list, nil
}

// live starts the program and reaps it, on one thread: the kernel is to end the
// program if that thread goes, and it goes with this process only.
func (p *process) live() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(p.ended)
	p.mu.Lock()
	err := errors.New("ended before it was started")
	if !p.killed {
		err = p.cmd.Start()
	}
	p.alive = err == nil
	p.mu.Unlock()
	if err != nil {
		p.started <- err
		return
	}
	pid := p.cmd.Process.Pid
	release := func() {}
	if err := p.limits.set(pid); err != nil {
		p.Kill(context.Background())
		p.started <- err
	} else {
		if p.confine != nil {
			release = p.confine(pid)
		}
		p.started <- nil
	}
	// While it is a zombie its group's number is nobody else's.
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	_ = unix.Kill(-pid, unix.SIGKILL) // what it left behind; ESRCH: nothing
	p.alive = false
	p.mu.Unlock()
	state, err := p.cmd.Process.Wait()
	if err == nil && !state.Success() {
		err = errors.New(state.String())
	}
	p.mu.Lock()
	p.status = err
	p.mu.Unlock()
	release()
	until := time.Now().Add(lastWords)
	_ = p.stdout.SetReadDeadline(until) // pipes have deadlines
	_ = p.stderr.SetReadDeadline(until)
}

func (l Limits) set(pid int) error {
	for _, r := range []struct {
		name  string
		which int
		value uint64
	}{
		{"core size", unix.RLIMIT_CORE, 0}, {"memory", unix.RLIMIT_DATA, l.DataBytes},
		{"file size", unix.RLIMIT_FSIZE, l.FileBytes}, {"open files", unix.RLIMIT_NOFILE, l.Files},
	} {
		err := unix.Prlimit(pid, r.which, &unix.Rlimit{Cur: r.value, Max: r.value}, nil)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("limit the %s of pid %d: %w", r.name, pid, err)
		}
	}
	return nil
}

// Kill ends the process and its group; every wait on it ends soon after. Before the
// start it prevents that.
func (p *process) Kill(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
	if p.alive {
		if err := unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// Wait returns when the process has ended.
func (p *process) Wait(context.Context) error {
	<-p.ended
	_ = p.stdout.Close() // read to the end by now
	_ = p.stderr.Close()
	return p.exitStatus()
}

// waitIfStarted is Wait for one that may never have been started.
func (p *process) waitIfStarted() {
	p.mu.Lock()
	begun := p.begun
	p.mu.Unlock()
	if begun {
		<-p.ended
	}
}

// exitStatus is how it ended; nil while it runs, and if it ended well.
func (p *process) exitStatus() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.alive {
		return 0
	}
	return p.cmd.Process.Pid
}

func (p *process) Stdout() io.ReadCloser { return p.stdout }
func (p *process) Stderr() io.ReadCloser { return p.stderr }
func (p *process) Name() string          { return p.cmd.Path }
func (p *process) ID() string            { return strconv.Itoa(p.pid()) }

// Diagnose has nothing to add: what the program said is in the error already.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost and HostToPlugin: both see the same files.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	return network, address, nil
}

func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
