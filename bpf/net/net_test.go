package net

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	stdnet "net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"os/exec"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wire is a pair of interfaces between two network namespaces of our own: the host's
// end, which is watched, and the guest's, in which a server answers. Sockets stay in
// the namespace they were made in, whichever thread uses them.
type wire struct {
	t       testing.TB
	m       *Monitor
	ifindex int
	inside  func(func() error) error // runs on a thread of the guest's namespace
	host    func(func() error) error // and of the host's
}

// in runs f on a thread that has entered a namespace (and ends with it).
func in(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// newNamespace makes a network namespace without a name.
func newNamespace(t testing.TB) *os.File {
	t.Helper()
	type made struct {
		f   *os.File
		err error
	}
	c := make(chan made, 1)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		var f *os.File
		if err == nil {
			f, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		}
		c <- made{f, err}
	}()
	n := <-c
	if n.err != nil {
		t.Fatal(n.err)
	}
	t.Cleanup(func() { n.f.Close() })
	return n.f
}

func ip(args string) error {
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}

func newWire(t testing.TB, o Options) *wire {
	t.Helper()
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	host, guest := newNamespace(t), newNamespace(t)
	w := &wire{t: t, m: m, inside: func(f func() error) error { return in(guest, f) }, host: func(f func() error) error { return in(host, f) }}
	// "ip link set netns" wants a process or a name: a thread in the guest's
	// namespace is as good as a process.
	entered, leave := make(chan int), make(chan struct{})
	gone := make(chan error, 1)
	go func() {
		gone <- w.inside(func() error {
			entered <- unix.Gettid()
			<-leave
			return nil
		})
	}()
	tid := <-entered
	err = w.host(func() error {
		return errors.Join(
			ip("link add tap0 type veth peer name eth0 netns /proc/"+fmt.Sprint(os.Getpid())+"/task/"+fmt.Sprint(tid)+"/ns/net"),
			ip("link set lo up"), ip("addr add 10.9.0.1/24 dev tap0"), ip("addr add fd09::1/64 dev tap0 nodad"), ip("link set tap0 up"))
	})
	close(leave)
	if err = errors.Join(err, <-gone); err != nil {
		t.Fatal(err)
	}
	if err := w.inside(func() error {
		return errors.Join(ip("link set lo up"), ip("addr add 10.9.0.2/24 dev eth0"), ip("addr add fd09::2/64 dev eth0 nodad"), ip("link set eth0 up"))
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.host(func() error {
		i, err := stdnet.InterfaceByName("tap0")
		if err != nil {
			return err
		}
		w.ifindex = i.Index
		// What IPv6 says on its own account when an interface comes up.
		time.Sleep(20 * time.Millisecond)
		return m.Attach(i.Index, o)
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Detach(w.ifindex); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *wire) read() Traffic {
	w.t.Helper()
	tr, err := w.m.Read(w.ifindex)
	if err != nil {
		w.t.Fatal(err)
	}
	return tr
}

// serve accepts connections inside and hands each to do.
func (w *wire) serve(addr string, do func(stdnet.Conn)) (address string) {
	w.t.Helper()
	var l stdnet.Listener
	if err := w.inside(func() (err error) {
		l, err = stdnet.Listen("tcp", addr)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			do(c)
			c.Close()
		}
	}()
	w.t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func (w *wire) dial(addr string) *stdnet.TCPConn {
	w.t.Helper()
	var c stdnet.Conn
	if err := w.host(func() (err error) {
		c, err = stdnet.Dial("tcp", addr)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	return c.(*stdnet.TCPConn)
}

// udp is a socket to an echo server inside. Nothing but what is sent goes over the
// wire: no acknowledgement that comes late.
func (w *wire) udp() stdnet.Conn {
	w.t.Helper()
	var server stdnet.PacketConn
	var c stdnet.Conn
	err := w.inside(func() (err error) {
		server, err = stdnet.ListenPacket("udp", "10.9.0.2:0")
		return err
	})
	if err == nil {
		err = w.host(func() (err error) {
			c, err = stdnet.Dial("udp", server.LocalAddr().String())
			return err
		})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(buf[:n], from)
		}
	}()
	w.t.Cleanup(func() { c.Close(); server.Close(); <-done })
	return c
}

func echo(c stdnet.Conn) {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, "you said "+line)
	}
}

// TestRequests: every request and every answer is counted, over IPv4 and IPv6.
func TestRequests(t *testing.T) {
	for _, addr := range []string{"10.9.0.2:0", "[fd09::2]:0"} {
		t.Run(addr, func(t *testing.T) {
			w := newWire(t, Options{Gap: 10 * time.Millisecond})
			before := w.read()
			c := w.dial(w.serve(addr, echo))
			defer c.Close()
			r := bufio.NewReader(c)
			const n = 200
			for i := range n {
				fmt.Fprintf(c, "request %d\n", i)
				if _, err := r.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			got := w.read()
			if got.Requests-before.Requests != n || got.Answers-before.Answers != n || got.Pending != 0 || got.Gone != 0 {
				t.Errorf("%+v", got)
			}
			if got.PacketsIn < n || got.PacketsOut < n || got.BytesIn < 12*n || got.AnswerTime <= 0 {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestPending: a request that is not answered is seen to wait, and one whose
// connection goes away is not forgotten.
func TestPending(t *testing.T) {
	w := newWire(t, Options{})
	hold, heard := make(chan struct{}), make(chan struct{})
	addr := w.serve("10.9.0.2:0", func(c stdnet.Conn) {
		buf := make([]byte, 10)
		if _, err := c.Read(buf); err == nil {
			close(heard)
		}
		<-hold
	})
	c := w.dial(addr)
	if _, err := io.WriteString(c, "well?"); err != nil {
		t.Fatal(err)
	}
	<-heard
	if got := w.read(); got.Pending != 1 || got.Requests != 1 || got.Answers != 0 {
		t.Errorf("%+v", got)
	}
	close(hold) // the server closes without an answer
	_, _ = io.Copy(io.Discard, c)
	c.Close()
	if got := w.read(); got.Pending != 0 || got.Gone != 1 {
		t.Errorf("%+v", got)
	}
}

// TestStall: a receiver that does not read closes its window, once, and opens it
// again when it does.
func TestStall(t *testing.T) {
	w := newWire(t, Options{})
	read, all := make(chan struct{}), make(chan int64, 1)
	addr := w.serve("10.9.0.2:0", func(c stdnet.Conn) {
		_ = c.(*stdnet.TCPConn).SetReadBuffer(16 << 10)
		<-read
		n, _ := io.Copy(io.Discard, c)
		all <- n
	})
	c := w.dial(addr)
	sent := make(chan int, 1)
	go func() {
		n, _ := c.Write(make([]byte, 4<<20))
		_ = c.CloseWrite()
		sent <- n
	}()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for deadline := time.Now().Add(10 * time.Second); w.read().Stalled != 1; <-look.C {
		if time.Now().After(deadline) {
			t.Fatalf("no stall: %+v", w.read())
		}
	}
	mid := w.read()
	close(read)
	if n, m := <-sent, <-all; n != 4<<20 || m != int64(n) {
		t.Errorf("sent %d, read %d", n, m)
	}
	c.Close()
	end := w.read()
	if mid.Stalls == 0 || end.Stalled != 0 || end.Resumed != end.Stalls {
		t.Errorf("%+v then %+v", mid, end)
	}
	t.Logf("%d stalls", end.Stalls)
}

// TestGoneInterface: an interface that goes away takes its attachment with it.
func TestGoneInterface(t *testing.T) {
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer m.Close()
	ns := newNamespace(t)
	if err := in(ns, func() error {
		if err := ip("link add name cka type veth peer name ckb"); err != nil {
			return err
		}
		i, err := stdnet.InterfaceByName("cka")
		if err != nil {
			return err
		}
		if err := m.Attach(i.Index, Options{Gap: time.Millisecond}); err != nil {
			return err
		}
		if err := m.Attach(i.Index, Options{}); err == nil {
			return errors.New("attached twice")
		}
		if err := ip("link del dev cka"); err != nil {
			return err
		}
		return m.Detach(i.Index)
	}); err != nil {
		t.Error(err)
	}
	if err := m.Attach(1<<30, Options{}); err == nil {
		t.Error("attached to an interface that is not there")
	}
	var key uint32
	if err := m.objs.Devices.NextKey(nil, &key); err == nil {
		t.Error("a device is left")
	}
}
