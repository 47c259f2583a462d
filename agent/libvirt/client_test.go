package libvirt_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/libvirt"
	"github.com/ckagent/ckagent/agent/libvirt/libvirttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var domain = libvirt.Domain{Name: "demo", UUID: [16]byte{1, 2, 3, 15: 9}, ID: 7}

func open(t *testing.T, d *libvirttest.Daemon) *libvirt.Client {
	t.Helper()
	d.Domain = domain
	conn, err := d.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	c, err := libvirt.New(t.Context(), conn, "qemu:///system")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestProcedures(t *testing.T) {
	c := open(t, &libvirttest.Daemon{
		XML:   func(flags uint32) string { return strings.Repeat("x", int(flags)) },
		State: func() (int32, int32) { return int32(libvirt.Paused), 1 }, Autostart: 1,
	})
	ctx := t.Context()
	if v, err := c.Version(ctx); err != nil || v != 9000000 {
		t.Errorf("version %d, %v", v, err)
	}
	if d, err := c.Lookup(ctx, domain.UUID); err != nil || d != domain {
		t.Errorf("lookup: %+v, %v", d, err)
	}
	if _, err := c.Lookup(ctx, [16]byte{}); !libvirt.IsNoDomain(err) {
		t.Errorf("lookup of nobody: %v", err)
	}
	for flags := range libvirt.XMLFlags(6) { // every padding
		if text, err := c.XML(ctx, domain, flags); err != nil || len(text) != int(flags) {
			t.Errorf("XML with flags %d: %q, %v", flags, text, err)
		}
	}
	if on, err := c.Autostart(ctx, domain); err != nil || !on {
		t.Errorf("autostart %v, %v", on, err)
	}
	if s, r, err := c.State(ctx, domain); err != nil || s != libvirt.Paused || r != 1 {
		t.Errorf("state %v, reason %d, %v", s, r, err)
	}
}

func TestMonitorPassesADescriptor(t *testing.T) {
	c := open(t, &libvirttest.Daemon{Monitor: func(command string, file *os.File) (string, error) {
		if file == nil {
			return "", &libvirt.Error{Code: 68, Message: "held by " + command}
		}
		defer file.Close()
		b, err := io.ReadAll(file)
		return string(b), err
	}})
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("through the socket"), 0); err != nil {
		t.Fatal(err)
	}
	if text, err := c.Monitor(t.Context(), domain, "add-fd", f); err != nil || text != "through the socket" {
		t.Errorf("%q, %v", text, err)
	}
	_, err = c.Monitor(t.Context(), domain, "stop", nil)
	if !libvirt.IsBusy(err) || !strings.Contains(err.Error(), "held by stop") {
		t.Errorf("without: %v", err)
	}
}

func TestEvents(t *testing.T) {
	d := &libvirttest.Daemon{}
	c := open(t, d)
	got := make(chan libvirt.Event, 4)
	if err := c.Watch(t.Context(), domain, func(e libvirt.Event) { got <- e }); err != nil {
		t.Fatal(err)
	}
	for _, details := range []string{"", `{"a":1}`} {
		if err := d.Event("STOP", details, 1700000000, 250000); err != nil {
			t.Fatal(err)
		}
		e := <-got
		if e.Name != "STOP" || e.Domain != domain || e.Details != details || !e.Time().Equal(time.Unix(1700000000, 250000000)) {
			t.Errorf("event %+v", e)
		}
	}
}

// A call that is given up leaves the connection in order: its reply is thrown
// away when it comes.
func TestGivenUpCall(t *testing.T) {
	release := make(chan struct{})
	c := open(t, &libvirttest.Daemon{Monitor: func(command string, _ *os.File) (string, error) {
		if command == "slow" {
			<-release
		}
		return command, nil
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Monitor(ctx, domain, "slow", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("slow: %v", err)
	}
	close(release)
	if text, err := c.Monitor(t.Context(), domain, "quick", nil); err != nil || text != "quick" {
		t.Errorf("quick: %q, %v", text, err)
	}
}

func TestLostDaemon(t *testing.T) {
	d := &libvirttest.Daemon{}
	c := open(t, d)
	d.Close()
	<-c.Done()
	if _, err := c.Version(t.Context()); !errors.Is(err, libvirt.ErrLost) {
		t.Errorf("after the daemon's end: %v", err)
	}
}

// What is no daemon ends the connection, and is not believed to be one.
func TestStrangers(t *testing.T) {
	for name, says := range map[string]string{
		"nothing":    "",
		"a greeting": strings.Repeat(`{"QMP":`, 10),
		"too long":   "\x7f\xff\xff\xff" + strings.Repeat("\x00", 24),
		"too short":  "\x00\x00\x00\x08" + strings.Repeat("\x00", 24),
		"a stream":   "\x00\x00\x00\x1c\x20\x00\x80\x86\x00\x00\x00\x01\x00\x00\x00\x42\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x00",
	} {
		l, err := net.Listen("unix", t.TempDir()+"/s")
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, says)
			if says == "" {
				conn.Close()
				return
			}
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}()
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := libvirt.New(t.Context(), conn.(*net.UnixConn), "qemu:///system")
		if c != nil || err == nil || !errors.Is(err, libvirt.ErrLost) {
			t.Errorf("%s: %v", name, err)
		}
		<-served
		l.Close()
	}
}
