package vmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The proxy's purpose: the memory of a machine is copied while the client
// believes that its cont is under way, and nothing moves meanwhile.
func TestProxyWithholdsCont(t *testing.T) {
	v := Start(t, Config{Guest: Mini, MemoryMiB: 64, WSMiB: 8, Rate: 20000})
	p, err := NewProxy(filepath.Join(v.Dir(), "p.sock"), v.QMPPath())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	hva, n, err := v.MainRAM()
	if err != nil {
		t.Fatal(err)
	}
	type copies struct {
		first, second []byte
		err           error
	}
	taken := make(chan copies, 1)
	p.Withhold("cont", func(context.Context, Message) {
		var c copies
		if c.first, c.err = ReadRAM(v.PID(), hva, n); c.err == nil {
			c.second, c.err = ReadRAM(v.PID(), hva, n)
		}
		taken <- c
	})
	m, err := DialMonitor(t.Context(), p.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v.WaitProgress(t, 1000)
	for _, command := range []string{"stop", "cont"} {
		if err := m.Execute(t.Context(), command, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	c := <-taken
	if c.err != nil || len(c.first) != int(n) || !bytes.Equal(c.first, c.second) {
		t.Fatalf("memory moved while cont was withheld: %v", c.err)
	}
	if _, err := m.AwaitEvent(t.Context(), "RESUME", time.Time{}); err != nil {
		t.Fatal(err)
	}
	v.WaitProgress(t, 1000)
	later, err := ReadRAM(v.PID(), hva, n)
	if err != nil || bytes.Equal(c.first, later) {
		t.Fatalf("the comparison cannot fail: %v", err)
	}
	v.Invariants()
	var commands []string
	for _, x := range p.Seen() {
		if x.Command != "" {
			commands = append(commands, x.Command)
		}
	}
	if want := []string{"qmp_capabilities", "stop", "cont"}; !slices.Equal(commands, want) {
		t.Fatalf("saw %q, want %q", commands, want)
	}
}

// fakeQEMU answers each object with {"return": {}} and keeps what it got.
type fakeQEMU struct {
	l    *net.UnixListener
	got  chan []byte
	fds  chan int
	done chan struct{}
}

func newFakeQEMU(t *testing.T, path string) *fakeQEMU {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeQEMU{l: l, got: make(chan []byte, 100), fds: make(chan int, 100), done: make(chan struct{})}
	go func() {
		defer close(f.done)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte(`{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}` + "\r\n"))
			buf, oob := make([]byte, 4096), make([]byte, 256)
			for {
				n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
				if n == 0 || err != nil {
					break
				}
				f.got <- bytes.Clone(buf[:n])
				for _, fd := range filesIn(oob[:oobn]) {
					f.fds <- fd
				}
				if buf[n-1] == '}' {
					_, _ = c.Write([]byte(`{"return": {}}` + "\r\n"))
				}
			}
			c.Close()
			f.got <- nil // hung up
		}
	}()
	t.Cleanup(func() { l.Close(); <-f.done })
	return f
}

func dialProxy(t *testing.T) (*Proxy, *fakeQEMU, *net.UnixConn) {
	dir := t.TempDir()
	f := newFakeQEMU(t, filepath.Join(dir, "q"))
	p, err := NewProxy(filepath.Join(dir, "p"), filepath.Join(dir, "q"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: p.Path(), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	expect(t, c, `{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}`+"\r\n")
	return p, f, c
}

func expect(t *testing.T, c *net.UnixConn, want string) {
	t.Helper()
	var got []byte
	for len(got) < len(want) {
		buf := make([]byte, len(want)-len(got))
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("read %q, then %v; want %q", got, err, want)
		}
		got = append(got, buf[:n]...)
	}
	if string(got) != want {
		t.Fatalf("read %q, want %q", got, want)
	}
}

func TestProxyPassesDescriptorsAndStrayBytes(t *testing.T) {
	p, f, c := dialProxy(t)
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// A descriptor in the middle of a message, after the reset byte.
	if _, err := c.Write([]byte("\xff\n{\"execute\": \"get")); err != nil {
		t.Fatal(err)
	}
	rest := `fd", "arguments": {"fdname": "a}\"{"}, "id": 7}`
	if _, _, err := c.WriteMsgUnix([]byte(rest), unix.UnixRights(int(file.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	expect(t, c, `{"return": {}}`+"\r\n")
	got, want := "", "\xff\n{\"execute\": \"get"+rest
	for len(got) < len(want) {
		got += string(<-f.got)
	}
	if got != want {
		t.Fatalf("QEMU got %q, want %q", got, want)
	}
	fd := <-f.fds
	defer unix.Close(fd)
	var a, b unix.Stat_t
	if unix.Fstat(fd, &a) != nil || unix.Fstat(int(file.Fd()), &b) != nil || a.Ino != b.Ino {
		t.Fatal("not the descriptor that was sent")
	}
	for _, m := range p.Seen() {
		if m.Command == "getfd" && string(m.ID) == "7" {
			return
		}
	}
	t.Fatalf("getfd was not seen: %+v", p.Seen())
}

func TestProxyVerdicts(t *testing.T) {
	command := `{"execute": "stop"}`
	for _, tc := range []struct {
		name    string
		verdict Verdict
		arrives string
		hangsUp bool
	}{
		{"pass", Pass, command, false},
		{"drop", Drop, "", false},
		{"cut", Cut, "", true},
		{"half", Half, command[:len(command)/2], true},
		{"hangup", Hangup, command, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, f, c := dialProxy(t)
			p.Add(Rule{Command: "stop", Decide: func(context.Context, Message) Verdict { return tc.verdict }})
			if _, err := c.Write([]byte(command)); err != nil {
				t.Fatal(err)
			}
			if !tc.hangsUp { // prove that the connection lives on
				if _, err := c.Write([]byte(`{"execute": "query-status"}`)); err != nil {
					t.Fatal(err)
				}
				got := ""
				for want := tc.arrives + `{"execute": "query-status"}`; len(got) < len(want); {
					got += string(<-f.got)
					if len(got) >= len(want) && got != want {
						t.Fatalf("QEMU got %q, want %q", got, want)
					}
				}
				return
			}
			got := ""
			for b := <-f.got; b != nil; b = <-f.got {
				got += string(b)
			}
			if got != tc.arrives {
				t.Fatalf("QEMU got %q, want %q", got, tc.arrives)
			}
		})
	}
}

// Closing frees a rule that waits for its context.
func TestProxyCloseCancelsRules(t *testing.T) {
	p, _, c := dialProxy(t)
	held := make(chan struct{})
	p.Withhold("stop", func(ctx context.Context, m Message) {
		close(held)
		<-ctx.Done()
	})
	if _, err := c.Write([]byte(`{"execute": "stop"}`)); err != nil {
		t.Fatal(err)
	}
	<-held
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// Whatever the bytes and however they are cut, they come out the same, and
// every message is one JSON value to the standard decoder if it is valid at all.
func FuzzSplitter(f *testing.F) {
	f.Add([]byte(`{"a": "}\"{"} {"b": {}}`+"\n"), uint8(3))
	f.Add([]byte("{\"half\xff\n{\"execute\": \"x\"}"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		var s splitter
		var out []byte
		for rest := data; len(rest) > 0; {
			n := min(len(rest), int(step)+1)
			for _, x := range s.feed(rest[:n]) {
				out = append(out, x.data...)
				if x.message && (x.data[0] != '{' || x.data[len(x.data)-1] != '}') {
					t.Fatalf("message %q", x.data)
				}
			}
			rest = rest[n:]
		}
		if out = append(out, s.object...); !bytes.Equal(out, data) {
			t.Fatalf("%q became %q", data, out)
		}
		if bytes.IndexByte(data, 0xff) < 0 && json.Valid(data) && len(bytes.TrimSpace(data)) > 0 && bytes.TrimSpace(data)[0] == '{' {
			var whole splitter
			messages := 0
			for _, x := range whole.feed(data) {
				if x.message {
					messages++
				}
			}
			if messages != 1 {
				t.Fatalf("%q: %d messages", data, messages)
			}
		}
	})
}
