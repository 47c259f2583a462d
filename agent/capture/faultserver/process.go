package faultserver

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/passfd"
)

// Process is a fault server that knows of no VM yet: a process of its own, waiting for
// its configuration. It can be started long before it is needed, beside whatever else
// there is to do. It ends when it is closed, and by itself when we die.
type Process struct {
	cmd   *exec.Cmd
	conn  *net.UnixConn
	moved chan struct{} // closed when it is in a group of its own
}

// expectation is the first thing that the process is told.
type expectation struct {
	Engine Engine `json:"engine"` // what it is going to be, as a rule: it prepares for that
}

// Launch starts a fault server by our own binary and the arguments that lead to Main.
// The engine is a guess, by which the process gets ready: any other works as well.
func Launch(self string, args []string, engine Engine) (*Process, error) {
	conn, peer, err := passfd.Pair("fault server")
	if err != nil {
		return nil, err
	}
	defer peer.Close() // or the end of the server would not end our reads
	p := &Process{cmd: exec.Command(self, args...), conn: conn, moved: make(chan struct{})}
	p.cmd.ExtraFiles = []*os.File{peer}
	p.cmd.Stderr = os.Stderr
	// No collection, no preemption signals: a fault thread is left alone.
	p.cmd.Env = []string{"GODEBUG=asyncpreemptoff=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	// Its own session: closing a terminal or ^C is for the agent to handle.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the fault server: %w", err), p.conn.Close())
	}
	go func() { // joined by settle
		defer close(p.moved)
		// Apart from the agent: who freezes or starves that must not hold the guest.
		cgroup.Move(p.PID(), p.group())
	}()
	if err := p.tell(expectation{engine}); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

func (p *Process) group() string { return fmt.Sprintf("faultserver-%d", p.PID()) }

// settle waits until it is apart from us. Moving a process between groups waits for all
// processors of the host, which is why others go on meanwhile.
func (p *Process) settle() { <-p.moved }

// tell sends one message, with files that the process then has as well.
func (p *Process) tell(message any, files ...*os.File) error {
	if err := passfd.Send(p.conn, message, files...); err != nil {
		return fmt.Errorf("configure the fault server: %w", err)
	}
	return nil
}

// Close ends it. A process that does not end within a second is killed.
func (p *Process) Close() error {
	err := p.conn.Close()
	kill := time.AfterFunc(time.Second, func() { _ = p.cmd.Process.Kill() })
	// How it ended does not matter any more; that it ended does.
	_ = p.cmd.Wait()
	kill.Stop()
	p.settle()
	cgroup.Remove(p.group())
	return err
}
