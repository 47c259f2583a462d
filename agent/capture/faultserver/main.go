package faultserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/heartbeat"
	"github.com/ckagent/ckagent/agent/passfd"
)

// socketFD is the descriptor that a fault server inherits. The others come with its
// configuration, in this order.
const socketFD = 3

const (
	arenaFile = iota
	controlFile
	keptFile // with Config.Kept
	maxFiles
)

const (
	maxDatagram = 1 << 20
	beatEvery   = 20 * time.Millisecond
)

// Deps are what the process needs from packages above this one.
type Deps struct {
	// Take creates a userfaultfd inside the process and returns our descriptor
	// of it, the only one left.
	Take func(pid int, vcpus []int) (*os.File, error)
	// OpenControl maps the control page and returns what marks us alive in it.
	OpenControl func(*os.File) (beat func(), err error)
}

// Main is the process. It ends when its capture is over, the agent closes the
// socket or dies.
func Main(d Deps) (err error) {
	// A thread inside a bare system call holds its P and cannot be stopped, so the
	// world is never to be stopped from here on: no collection, and enough Ps for
	// all threads from the beginning.
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(maxThreads + maxThreads + 8)
	// Where locking is not allowed the server still works, less predictably.
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	// The guest waits for these threads, and the guardian for their heartbeat: on
	// a busy host they must not queue behind everybody. We are a session, and so a
	// group, of our own. The scanners step back again.
	_ = unix.Setpriority(unix.PRIO_PGRP, 0, serverNice)
	stepBack()

	conn, err := passfd.Inherited(socketFD, "fault server")
	if err != nil {
		return err
	}
	defer conn.Close()
	types, cfg, files, err := awaitConfig(conn)
	if errors.Is(err, errNotNeeded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer types.wait()
	beat, err := d.OpenControl(files[controlFile])
	if err != nil {
		return err
	}
	hb, err := heartbeat.StartPinned(beatEvery, beat)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hb.Stop()) }()
	a, err := arena.Open(files[arenaFile])
	if err != nil {
		return err
	}
	// Behind everybody's back: it takes a tenth of a second, and is over long
	// before the first page is captured. A page that is not there yet costs the
	// thread that comes first a microsecond.
	populated := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with us, and its priority with it
		background()
		populated <- a.Populate()
	}()
	defer func() { err = errors.Join(err, <-populated) }()
	s, err := newServer(cfg, a, types.cache)
	if err != nil {
		return errors.Join(err, send(conn, nil, err))
	}
	if err := send(conn, s, nil); err != nil {
		return err
	}
	loop := &commandLoop{s: s, conn: conn, take: d.Take}
	if cfg.Kept {
		loop.take = func(int, []int) (*os.File, error) { return files[keptFile], nil }
	}
	return errors.Join(loop.run(), s.close())
}

// commandLoop owns the server's phase.
type commandLoop struct {
	s    *server
	conn *net.UnixConn
	take func(pid int, vcpus []int) (*os.File, error)
}

// run serves commands until the capture is over. Whatever happens, nothing is
// armed when it returns.
func (l *commandLoop) run() error {
	requests := make(chan op)
	done := make(chan struct{})
	readErr := make(chan error, 1)
	go func() { // joined by readErr: closing the socket ends its read
		readErr <- l.read(requests, done)
		close(requests)
	}()
	err := l.serve(requests)
	err = errors.Join(err, l.s.release())
	close(done)
	err = errors.Join(err, l.conn.Close())
	if e := <-readErr; !errors.Is(e, io.EOF) && !errors.Is(e, net.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}

func (l *commandLoop) read(requests chan<- op, done <-chan struct{}) error {
	buf := make([]byte, 4096)
	for {
		n, err := l.conn.Read(buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.EOF
		}
		o, err := decodeRequest(buf[:n])
		if err != nil {
			return err
		}
		select {
		case requests <- o:
		case <-done:
			return io.EOF
		}
	}
}

func (l *commandLoop) serve(requests <-chan op) error {
	complete := (chan struct{})(nil)
	for {
		select {
		case <-l.s.failed:
			// Let go first; the agent learns of it by its next request, or now
			// if it is waiting for the scan.
			err := l.s.release()
			if complete != nil {
				return errors.Join(err, send(l.conn, l.s, l.s.failure.Load()))
			}
			if _, open := <-requests; !open {
				return err
			}
			return errors.Join(err, send(l.conn, l.s, l.s.failure.Load()))
		case <-complete:
			return l.finish()
		case o, open := <-requests:
			if !open {
				return nil // the agent is gone: run lets go
			}
			var err error
			switch {
			case o == opPrearm && phase(l.s.phase.Load()) == idle:
				err = l.s.prearm(func() (*os.File, error) { return l.take(l.s.cfg.QEMUPID, l.s.cfg.VCPUs) })
			case o == opRearm && phase(l.s.phase.Load()) == tracking:
				stepForward() // the guest is about to be stopped
				err = l.s.engine.settle()
			case o == opFreeze && phase(l.s.phase.Load()) == tracking:
				err = l.s.freeze()
			case o == opScan && phase(l.s.phase.Load()) == capturing && complete == nil:
				complete = l.s.complete
				l.s.engine.scan()
				continue // the reply comes when everything is captured
			case o == opAbort:
				err = &Error{Failure: Aborted, Detail: "asked to"}
			default:
				err = &Error{Failure: Broken, Detail: fmt.Sprintf("request %q in phase %d", o, l.s.phase.Load())}
			}
			if err != nil {
				err = errors.Join(err, l.s.release())
			}
			if sendErr := send(l.conn, l.s, err); sendErr != nil || err != nil {
				return sendErr
			}
		}
	}
}

// finish ends a complete capture: let go or leave the marks to who keeps them, end the
// rings, mend huge pages.
func (l *commandLoop) finish() error {
	l.s.stats.ScanNS = time.Since(l.s.froze).Nanoseconds()
	var err error
	if l.s.cfg.Keep && l.s.failedWith() == nil {
		err = l.s.leave()
	} else {
		err = l.s.release()
	}
	if err == nil {
		err = l.s.failedWith()
	}
	if err == nil {
		err = l.s.finishRings()
	}
	stepBack()
	if !l.s.cfg.Keep { // what is marked cannot be made whole
		l.s.collapse()
	}
	return send(l.conn, l.s, err)
}

// send replies with the figures so far and the error, if there is one.
func send(conn *net.UnixConn, s *server, err error) error {
	var r reply
	if s != nil {
		r.Stats = s.stats
		if s.held {
			r.FD = int(s.h.FD())
		}
	}
	if err != nil {
		r.Failure, r.Detail = Broken, err.Error()
		if e, ok := errors.AsType[*Error](err); ok {
			r.Failure, r.Detail, r.Escaped = e.Failure, e.Detail, e.Escaped
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err := conn.Write(b); err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("fault server: reply: %w", err)
	}
	return nil
}
