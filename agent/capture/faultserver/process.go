package faultserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
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
	p := &Process{moved: make(chan struct{})}
	peer, err := p.socketPair()
	if err != nil {
		return nil, err
	}
	defer peer.Close() // or the end of the server would not end our reads
	p.cmd = exec.Command(self, args...)
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

func (p *Process) socketPair() (peer *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "fault server")
	defer ours.Close()
	peer = os.NewFile(uintptr(fds[1]), "fault server peer")
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, errors.Join(err, peer.Close())
	}
	p.conn = conn.(*net.UnixConn)
	return peer, nil
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

func (p *Process) group() string { return fmt.Sprintf("faultserver-%d", p.PID()) }

// settle waits until it is apart from us. Moving a process between groups waits for all
// processors of the host, which is why others go on meanwhile.
func (p *Process) settle() { <-p.moved }

// sendPatience bounds what is said before anything is answered: a process that does not
// read has room for it, unless it was told too much.
const sendPatience = 5 * time.Second

// tell sends one message, with files that the process then has as well.
func (p *Process) tell(message any, files ...*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			conn, err := f.SyscallConn()
			if err != nil {
				return err
			}
			if err := conn.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return err
			}
		}
		rights = unix.UnixRights(fds...)
	}
	if err := p.conn.SetWriteDeadline(time.Now().Add(sendPatience)); err != nil {
		return err
	}
	if _, _, err := p.conn.WriteMsgUnix(b, rights, nil); err != nil {
		return fmt.Errorf("configure the fault server: %w", err)
	}
	return p.conn.SetWriteDeadline(time.Time{})
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
