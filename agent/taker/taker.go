package taker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/passfd"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Config is what a taker is started with. Of Order.Capture the functions Progress and Pace
// are called in this process; it must have no others.
type Config struct {
	Helper []string // command line of our own binary; the verb is appended
	Lock   *os.File // of the VM
	Order  Order
	// Heard is told of what the VM's monitor announces while the child has it. nil: nobody is.
	Heard func(qmp.Event)
	// Track, if not nil, is given to the child, and is what it keeps when it has succeeded.
	Track *capture.Tracking
}

// Taker is the daemon's side of a child.
type Taker struct {
	cfg    Config
	object string
	cmd    *exec.Cmd
	line   *net.UnixConn
	in     *json.Decoder
	said   *hearing

	send    sync.Mutex // of out; hungUp
	out     *json.Encoder
	hungUp  bool
	grants  sync.WaitGroup
	vigil   *vigil
	marks   *marks // nil without Config.Track
	closing sync.Once
}

// Start starts a child, and returns when it has looked at the VM. The error is what the
// child refuses, or why there is none.
func Start(ctx context.Context, cfg Config) (*Taker, error) {
	o := &cfg.Order
	t := &Taker{cfg: cfg, object: fmt.Sprintf("VM %s (pid %d)", o.Name, o.PID)}
	fail := func(err error) (*Taker, error) {
		return nil, problem.New(problem.Failed, "start a checkpoint", t.object, "%w", err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "line"), os.NewFile(uintptr(fds[1]), "line")
	defer theirs.Close() // or its end would not be seen
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return fail(err)
	}
	t.line = conn.(*net.UnixConn) // a unix socket makes a UnixConn
	t.in, t.out = json.NewDecoder(t.line), json.NewEncoder(t.line)
	words, ear, err := os.Pipe()
	if err != nil {
		return fail(errors.Join(err, t.line.Close()))
	}
	defer ear.Close()
	argv := append(append([]string{}, cfg.Helper...), Verb, strconv.Itoa(o.PID))
	t.cmd = exec.Command(argv[0], argv[1:]...)
	t.cmd.Stderr = ear
	t.cmd.ExtraFiles = []*os.File{theirs, cfg.Lock}
	var peer *os.File
	if cfg.Track != nil {
		way, theirs, err := passfd.Pair("marks")
		if err != nil {
			return fail(errors.Join(err, t.line.Close(), words.Close()))
		}
		defer theirs.Close()
		t.marks, peer = &marks{way}, theirs
		t.cmd.ExtraFiles = append(t.cmd.ExtraFiles, peer)
	}
	// Closing a terminal or ^C is for the daemon to handle.
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := t.cmd.Start(); err != nil {
		return fail(errors.Join(err, t.line.Close(), words.Close(), t.marks.close()))
	}
	theirs.Close()
	ear.Close()
	peer.Close() // nil: there is none
	t.said = hear(words)
	t.vigil = watchOver(silence, t.kill)
	order := *o
	order.Protocol, order.Paced, order.Tracked = protocol, o.Capture.Pace != nil, t.marks != nil
	// The marks first: who has the order takes them for sent.
	if t.marks.give(cfg.Track) != nil || t.tell(down{Order: &order}) != nil {
		return nil, errors.Join(t.died(ctx), t.Close())
	}
	u, err := t.listen(ctx)
	switch {
	case err == nil && ctx.Err() != nil:
		err = problem.New(problem.Cancelled, "start a checkpoint", t.object, "%w", ctx.Err())
	case err == nil && !u.Ready:
		err = problem.New(problem.Failed, "start a checkpoint", t.object, "it was taken before the word was given")
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// Take has the checkpoint taken. When ctx ends it is given up.
func (t *Taker) Take(ctx context.Context) (*capture.Result, error) {
	if err := t.tell(down{Begin: true}); err != nil {
		return nil, t.died(ctx)
	}
	u, err := t.listen(ctx)
	if err != nil {
		return nil, err
	}
	if t.marks != nil {
		k, err := t.marks.take()
		if err != nil { // the next one reads everything
			u.Result.Notes = append(u.Result.Notes, err.Error())
		} else {
			*t.cfg.Track = *k
		}
	}
	return u.Result, nil
}

// PID is the child's.
func (t *Taker) PID() int { return t.cmd.Process.Pid }

// tell says something to the child.
func (t *Taker) tell(d down) error {
	t.send.Lock()
	defer t.send.Unlock()
	if t.hungUp {
		return net.ErrClosed
	}
	return t.out.Encode(d)
}

// hangUp is the order to give up.
func (t *Taker) hangUp() {
	// Whoever writes just now may wait for a child that does not read: its end ends that.
	_ = t.line.SetWriteDeadline(time.Unix(1, 0))
	t.send.Lock()
	defer t.send.Unlock()
	t.hungUp = true
	_ = t.line.CloseWrite() // fails when it has ended: nobody has to be told
}

// listen hears the child until it is ready or has done.
func (t *Taker) listen(ctx context.Context) (up, error) {
	defer context.AfterFunc(ctx, t.hangUp)()
	granting, done := context.WithCancel(ctx)
	defer done()
	t.vigil.expect()
	defer t.vigil.rest() // while hooks run nobody listens
	for {
		var u up
		if err := t.in.Decode(&u); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				t.kill()
			}
			return u, t.died(ctx)
		}
		t.vigil.expect()
		o := &t.cfg.Order.Capture
		if u.Urgent > 0 && o.Pace != nil {
			_ = o.Pace(ctx, u.Urgent, true) // it only counts
		}
		switch {
		case u.Error != nil:
			return u, u.Error.Err()
		case u.Ready || u.last():
			return u, nil
		case u.Step != nil && o.Progress != nil:
			o.Progress(*u.Step)
		case u.Heard != nil && t.cfg.Heard != nil:
			t.cfg.Heard(*u.Heard)
		case u.Ask != nil && o.Pace != nil:
			t.grants.Go(func() {
				if o.Pace(granting, u.Ask.Bytes, false) == nil {
					_ = t.tell(down{Granted: u.Ask.Number}) // else it has ended, and asks no more
				}
			})
		}
	}
}

// kill ends the child even where it is frozen or starved by its control groups.
func (t *Taker) kill() {
	if t.cmd.Process.Kill() == nil { // else it has ended
		cgroup.Roots().Free(t.cmd.Process.Pid)
	}
}

// died is the error about a child that ended without a word.
func (t *Taker) died(ctx context.Context) error {
	t.end()
	all := t.said.wait(aftermath) // whoever puts the VM right says so when that is done
	how := "its process ended: " + t.cmd.ProcessState.String()
	if t.vigil.lapsed() {
		how = fmt.Sprintf("nothing was heard of its process for %v, so it was ended", silence)
	}
	if words := t.said.text(); words != "" {
		how += "; it was said: " + words
	}
	switch {
	case !all:
		return t.unfinished(how)
	case ctx.Err() != nil:
		return problem.New(problem.Cancelled, "checkpoint", t.object, "%w", ctx.Err())
	}
	err := problem.New(problem.Failed, "checkpoint", t.object, "%s", how).WithHint("the VM was left as it was; the next checkpoint is another process's")
	err.Retryable = true
	return err
}

// end waits until the child has ended.
func (t *Taker) end() {
	t.closing.Do(func() {
		t.hangUp()
		t.vigil.expect()
		_ = t.cmd.Wait() // the state says it
		t.vigil.close()
		_ = t.line.Close()
		_ = t.marks.close()
		t.grants.Wait()
	})
}

// Said is what the child and its helpers said on standard error. After Close.
func (t *Taker) Said() string { return t.said.text() }

// Close gives up what is still under way, and returns when nothing of the child is left. The
// error says that something is.
func (t *Taker) Close() error {
	t.end()
	if t.said.wait(aftermath) {
		return nil
	}
	return t.unfinished("the process that took it has ended")
}

// unfinished is the error about helpers that outlive a child.
func (t *Taker) unfinished(how string) error {
	return problem.New(problem.Busy, "checkpoint", t.object, "%s; its guardian is not done with the VM", how).
		WithHint("ckagent release %d does by hand what it tries", t.cfg.Order.PID)
}
