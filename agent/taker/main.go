package taker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Take takes the checkpoint of an order, whose functions lead to the daemon by now. It
// calls Line.Ready before it begins. lock is the VM's, for it to close; what is tracked is
// left to whoever called it, unless there is an error.
type Take func(ctx context.Context, o *Order, lock *os.File, l *Line) (*capture.Result, error)

// heapLimit is when garbage is collected after all.
const heapLimit = 512 << 20

// Main is the child: the hidden verb of the binary.
func Main(ctx context.Context, take Take) error {
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP) // standard error may have lost its reader
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	unix.CloseOnExec(lineFD)
	unix.CloseOnExec(lockFD)
	lock := os.NewFile(lockFD, "lock")
	f := os.NewFile(lineFD, "line")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("the line to the daemon: %w", err)
	}
	defer conn.Close()
	// A collection stops the world, which waits for every thread that runs Go; on a busy
	// host for longer than the guardian waits for a beat. This process is short-lived.
	debug.SetMemoryLimit(heapLimit)
	debug.SetGCPercent(-1)
	return serve(ctx, conn, lock, take)
}

// serve carries out the one order that comes over the line.
func serve(ctx context.Context, conn net.Conn, lock *os.File, take Take) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := json.NewDecoder(conn)
	var d down
	if err := in.Decode(&d); err != nil || d.Order == nil {
		return errors.Join(errors.New("no order came"), err)
	}
	l := &Line{out: json.NewEncoder(conn), begin: make(chan struct{}), owing: make(chan struct{}, 1),
		words: make(chan up, wordsAhead), quit: make(chan struct{}), waiting: map[uint64]chan struct{}{}}
	var listening, speaking sync.WaitGroup
	listening.Go(func() { l.listen(in, cancel) })
	speaking.Go(func() { l.speak(cancel) })
	var res *capture.Result
	var err error
	if o := d.Order; o.Protocol != protocol {
		err = problem.New(problem.Busy, "checkpoint", "VM "+o.Name, "the daemon that runs is of another version than the ckagent that is installed").
			WithHint("restart the daemon")
	} else {
		o.Capture.Progress = l.step
		if o.Paced {
			o.Capture.Pace = l.pace
		}
		if o.Tracked {
			res, err = takeMarked(ctx, o, lock, l, take)
		} else {
			res, err = take(ctx, o, lock, l)
		}
	}
	close(l.quit)
	speaking.Wait()
	end := up{Result: res, Error: problem.ToWire("checkpoint", err)}
	if err == nil && res == nil {
		end.Error = problem.ToWire("checkpoint", errors.New("nothing came of it"))
	}
	_ = l.out.Encode(end) // a daemon that has gone hears nothing
	if c, ok := conn.(interface{ CloseRead() error }); ok {
		_ = c.CloseRead() // ends the listener
	}
	listening.Wait()
	return nil
}

// wordsAhead is how much may be said before the daemon has read it; more is dropped.
const wordsAhead = 256

// Line is the child's side.
type Line struct {
	out   *json.Encoder // of speak, and after it of serve
	words chan up
	quit  chan struct{} // closed when nothing more is said
	begin chan struct{} // closed by the word to begin

	urgent atomic.Int64
	owing  chan struct{} // has room for one: urgent is to be told

	mu      sync.Mutex
	asked   uint64
	waiting map[uint64]chan struct{} // by the number of the ask
}

// listen hears the daemon until that has nothing more to say.
func (l *Line) listen(in *json.Decoder, giveUp func()) {
	defer giveUp()
	begun := sync.OnceFunc(func() { close(l.begin) })
	for {
		var d down
		if in.Decode(&d) != nil {
			return
		}
		if d.Begin {
			begun()
		}
		l.mu.Lock()
		if w := l.waiting[d.Granted]; w != nil {
			close(w)
			delete(l.waiting, d.Granted)
		}
		l.mu.Unlock()
	}
}

// speak is the one who writes, so that nobody else waits for a daemon that does not read.
func (l *Line) speak(giveUp func()) {
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	for {
		var u up
		select {
		case u = <-l.words:
		case <-l.owing:
		case <-beat.C:
		case <-l.quit:
			l.rest()
			return
		}
		if l.say(u) != nil {
			giveUp()
			<-l.quit
			return
		}
	}
}

// rest says what was left to be said.
func (l *Line) rest() {
	for {
		select {
		case u := <-l.words:
			if l.say(u) != nil {
				return
			}
		default:
			_ = l.say(up{}) // what is owed
			return
		}
	}
}

func (l *Line) say(u up) error {
	u.Urgent = int(l.urgent.Swap(0))
	return l.out.Encode(u)
}

// tell has something said, unless too much is waiting to be.
func (l *Line) tell(u up) {
	select {
	case l.words <- u:
	default:
	}
}

func (l *Line) step(e capture.Event) { l.tell(up{Step: &e}) }

// Heard passes an event of the VM's monitor on.
func (l *Line) Heard(e qmp.Event) { l.tell(up{Heard: &e}) }

// Ready says that everything was looked at, and returns with the word to begin.
func (l *Line) Ready(ctx context.Context) error {
	select {
	case l.words <- up{Ready: true}:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-l.begin:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pace is capture.Options.Pace.
func (l *Line) pace(ctx context.Context, bytes int, urgent bool) error {
	if urgent {
		l.urgent.Add(int64(bytes))
		select {
		case l.owing <- struct{}{}:
		default:
		}
		return nil
	}
	granted := make(chan struct{})
	l.mu.Lock()
	l.asked++
	number := l.asked
	l.waiting[number] = granted
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.waiting, number)
		l.mu.Unlock()
	}()
	select {
	case l.words <- up{Ask: &ask{number, bytes}}:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-granted:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
