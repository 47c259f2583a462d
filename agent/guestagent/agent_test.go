package guestagent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// fake is an agent at the end of a socket.
type fake struct {
	t        *testing.T
	path     string
	greeting string // what somebody else left on the wire
	answer   func(command string) string
	commands chan string
	served   sync.WaitGroup
}

func newFake(t *testing.T, greeting string, answer func(string) string) *fake {
	t.Helper()
	dir := t.TempDir()
	f := &fake{t: t, greeting: greeting, answer: answer, commands: make(chan string, 100), path: filepath.Join(dir, strings.Repeat("long", 20), "ga.sock")}
	if err := os.Mkdir(filepath.Dir(f.path), 0o700); err != nil {
		t.Fatal(err)
	}
	// Longer than a socket's address may be: bound by a short name of the directory.
	d, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/ga.sock", d.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	f.served.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		f.serve(conn)
	})
	t.Cleanup(func() { l.Close(); f.served.Wait() })
	return f
}

func (f *fake) serve(conn net.Conn) {
	fmt.Fprint(conn, f.greeting)
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if at := strings.LastIndexByte(line, delimiter); at >= 0 {
			line = line[at+1:]
		}
		var req struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if err := json.Unmarshal([]byte(line), &req); err != nil {
			f.t.Errorf("request %q: %v", line, err)
			return
		}
		f.commands <- req.Execute
		reply := fmt.Sprintf("\xff{\"return\": %d}\n", req.Arguments.ID)
		if f.answer != nil && req.Execute != "guest-sync-delimited" {
			reply = f.answer(req.Execute)
		}
		if _, err := conn.Write([]byte(reply)); err != nil {
			return
		}
	}
}

func (f *fake) dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial(t.Context(), Channel{Network: "unix", Address: f.path}, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestConversation(t *testing.T) {
	// Half a reply of another conversation, and a whole one to another's sync.
	const greeting = "{\"return\": [1,2,\xff{\"return\": 7}\n\xff{\"return\": \"x\"}\n"
	f := newFake(t, greeting, func(command string) string {
		return map[string]string{
			"guest-fsfreeze-freeze": "{\"return\": 3}\n", "guest-fsfreeze-thaw": "{\"return\": 2}\n",
			"guest-fsfreeze-status": "{\"return\": \"frozen\"}\n", "guest-get-time": "{\"return\": 1700000000123456789}\n",
			"guest-set-time": "{\"error\": {\"class\": \"CommandDisabled\", \"desc\": \"no\\u0007 way\"}}\n",
		}[command]
	})
	c := f.dial(t)
	if n, err := c.Freeze(t.Context()); n != 3 || err != nil {
		t.Errorf("freeze: %d, %v", n, err)
	}
	if n, err := c.Thaw(t.Context()); n != 2 || err != nil {
		t.Errorf("thaw: %d, %v", n, err)
	}
	if on, err := c.Frozen(t.Context()); !on || err != nil {
		t.Errorf("status: %v, %v", on, err)
	}
	if at, err := c.Time(t.Context()); at.UnixNano() != 1700000000123456789 || err != nil {
		t.Errorf("time: %v, %v", at, err)
	}
	err := c.SetTime(t.Context(), time.Now())
	var refused *Error
	if !problem.Is(err, problem.Refused) || !errors.As(err, &refused) || strings.ContainsRune(err.Error(), 7) {
		t.Errorf("set time: %q", err)
	}
}

// TestBadAgent: whatever a guest answers ends in an error, soon.
func TestBadAgent(t *testing.T) {
	for name, reply := range map[string]string{
		"nothing": "", "half": "{\"return\"", "no JSON": "hello\n", "no result": "{}\n", "another type": "{\"return\": \"x\"}\n",
		"endless": strings.Repeat("x", maxReply+1), "endless line": "{\"return\":\"" + strings.Repeat("x", maxReply) + "\"}\n",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, "", func(string) string { return reply })
			c := f.dial(t)
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if _, err := c.Freeze(ctx); !problem.Is(err, problem.Failed) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("no sync", func(t *testing.T) {
		f := newFake(t, strings.Repeat("\xff{\"return\": 1}\n", maxSkip/10), nil)
		if c, err := Dial(t.Context(), Channel{Network: "unix", Address: f.path}, ""); err == nil {
			c.Close()
			t.Error("in step with what never answered")
		}
	})
	t.Run("nobody", func(t *testing.T) {
		if _, err := Dial(t.Context(), Channel{Network: "unix", Address: "/nowhere/ga.sock"}, ""); !problem.Is(err, problem.NotFound) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("taken", func(t *testing.T) {
		if _, err := Dial(t.Context(), Channel{Network: "unix", Address: "/x", Taken: true}, ""); !problem.Is(err, problem.Busy) {
			t.Errorf("got %v", err)
		}
	})
}

// want reads commands until one of the name comes.
func (f *fake) want(t *testing.T, command string) {
	t.Helper()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	for {
		select {
		case c := <-f.commands:
			if c == command {
				return
			}
		case <-timer.C:
			t.Fatalf("no %s", command)
		}
	}
}

func (f *fake) wantNone(t *testing.T, command string) {
	t.Helper()
	for len(f.commands) > 0 {
		if c := <-f.commands; c == command {
			t.Errorf("a %s that nobody needs", c)
		}
	}
}

// thawed is an agent that does whatever it is told.
func thawed(string) string { return "{\"return\": 1}\n" }

func guard(t *testing.T, f *fake, within time.Duration) (*Client, *Guard) {
	t.Helper()
	c := f.dial(t)
	g, err := StartGuard(GuardConfig{Helper: []string{os.Args[0]}, Agent: c, QEMUPID: os.Getpid(), Within: within})
	if err != nil {
		t.Fatal(err)
	}
	return c, g
}

func TestGuard(t *testing.T) {
	t.Run("released", func(t *testing.T) {
		f := newFake(t, "", thawed)
		_, g := guard(t, f, time.Minute)
		if err := g.Release(true); err != nil {
			t.Error(err)
		}
		f.wantNone(t, "guest-fsfreeze-thaw")
	})
	t.Run("not known to be thawed", func(t *testing.T) {
		f := newFake(t, "", thawed)
		_, g := guard(t, f, time.Minute)
		if err := g.Release(false); err != nil {
			t.Error(err)
		}
		f.want(t, "guest-fsfreeze-thaw")
	})
	t.Run("too long", func(t *testing.T) {
		f := newFake(t, "", thawed)
		_, g := guard(t, f, 100*time.Millisecond)
		f.want(t, "guest-fsfreeze-thaw")
		if err := g.Release(true); err != nil {
			t.Error(err)
		}
	})
	t.Run("its master died", func(t *testing.T) {
		f := newFake(t, "", thawed)
		c, g := guard(t, f, time.Minute)
		// All that is left of a process that was killed: its descriptors are closed.
		if err := errors.Join(g.link.Close(), c.Close()); err != nil {
			t.Error(err)
		}
		f.want(t, "guest-fsfreeze-thaw")
		if err := g.reap(); err != nil {
			t.Error(err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		f := newFake(t, "", thawed)
		_, g := guard(t, f, time.Minute)
		if err := unix.Kill(g.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := g.Release(true); !problem.Is(err, problem.Failed) {
			t.Errorf("got %v", err)
		}
	})
}

func TestParseFilename(t *testing.T) {
	for in, want := range map[string]Channel{
		"disconnected:unix:/run/ga.sock,server=on":            {Network: "unix", Address: "/run/ga.sock"},
		"unix:/run/ga.sock,server=on":                         {Network: "unix", Address: "/run/ga.sock", Taken: true},
		"unix:/run/ga.sock,server=on <-> unix:":               {Network: "unix", Address: "/run/ga.sock", Taken: true},
		"disconnected:unix:ga,server=on,abstract=on,tight=on": {Network: "unix", Address: "@ga"},
		"disconnected:tcp:127.0.0.1:5000,server=on":           {Network: "tcp", Address: "127.0.0.1:5000"},
		"tcp:127.0.0.1:5000,server=on <-> 127.0.0.1:36000":    {Network: "tcp", Address: "127.0.0.1:5000", Taken: true},
		"disconnected:unix:/run/ga.sock":                      {}, "null": {}, "": {}, "file": {}, "unix:,server=on": {}, "pty:/dev/pts/1": {},
	} {
		got, ok := parseFilename(in)
		if ok != (want.Address != "") || ok && got != want {
			t.Errorf("%q: %+v, %v", in, got, ok)
		}
	}
}

func FuzzReply(f *testing.F) {
	for _, s := range []string{"{\"return\": 1}\n", "\xff{\"return\": {}}\n", "{\"error\": {\"class\": \"x\", \"desc\": \"y\"}}\n", "{\"return\": null}\n", "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReaderSize(strings.NewReader(string(b)), 16)
		for {
			line, err := readLine(r)
			if err != nil {
				return
			}
			if len(line) > maxReply {
				t.Fatalf("a line of %d bytes", len(line))
			}
			var n int64
			err = decode(line, "x", &n)
			if refused, ok := errors.AsType[*Error](err); ok && strings.ContainsAny(refused.Error(), "\n\x00\x1b") {
				t.Fatalf("%q", refused.Error())
			}
		}
	})
}
