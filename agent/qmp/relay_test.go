package qmp

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/libvirt"
	"github.com/ckagent/ckagent/agent/libvirt/libvirttest"
	"github.com/ckagent/ckagent/agent/problem"
)

// newManaged returns a client whose commands a daemon carries out.
func newManaged(t *testing.T, d *libvirttest.Daemon) (*Client, error) {
	t.Helper()
	d.Domain = libvirt.Domain{Name: "demo", UUID: [16]byte{5}, ID: 1}
	monitor := d.Monitor
	d.Monitor = func(command string, file *os.File) (string, error) {
		if strings.Contains(command, "query-version") {
			return `{"return":{"qemu":{"micro":22,"minor":2,"major":7},"package":"p"},"id":"libvirt-1"}`, nil
		}
		return monitor(command, file)
	}
	conn, err := d.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	lib, err := libvirt.New(testContext(t), conn, "qemu:///system")
	if err != nil {
		t.Fatal(err)
	}
	c, err := newRelayed(testContext(t), Managed{Client: lib, Domain: d.Domain}, Endpoint{Libvirt: true, FD: -1})
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

func executed(t *testing.T, command string) string {
	t.Helper()
	var m map[string]json.RawMessage
	if err := json.Unmarshal([]byte(command), &m); err != nil {
		t.Errorf("libvirt was given %q: %v", command, err)
	}
	if _, ok := m["id"]; ok {
		t.Errorf("libvirt was given an id: %s", command)
	}
	var name string
	_ = json.Unmarshal(m["execute"], &name) // empty where it is none
	return name
}

// STOP is announced before stop is answered, though libvirt brings it later.
func TestRelayOrdersTheStop(t *testing.T) {
	d := &libvirttest.Daemon{}
	var stopped atomic.Bool
	d.Monitor = func(command string, _ *os.File) (string, error) {
		switch name := executed(t, command); name {
		case "query-status":
			if stopped.Load() {
				return `{"return":{"status":"paused","running":false},"id":"x"}`, nil
			}
			return `{"return":{"status":"running","running":true},"id":"x"}`, nil
		case "stop":
			stopped.Store(true)
			return `{"return":{},"id":"x"}`, nil
		case "xen-save-devices-state":
			return `{"return":{"saved":true},"id":"x"}`, d.Event("STOP", "", 1700000000, 7)
		default:
			return "", errors.New(name)
		}
	}
	c, err := newManaged(t, d)
	if err != nil {
		t.Fatal(err)
	}
	if v := c.Version(); v.String() != "7.2.22" || v.Package != "p" {
		t.Errorf("version %v", v)
	}
	if f, err := c.DupFile(); f != nil || err != nil {
		t.Errorf("a duplicate of a session that ends with us: %v, %v", f, err)
	}
	events := c.Subscribe(4)
	stop, _ := Encode("stop", nil)
	save, _ := Encode("xen-save-devices-state", map[string]any{"filename": "x"})
	for _, announced := range []bool{true, false} { // the second finds it stopped
		d := time.Now()
		calls, err := c.Send(stop, save)
		if err != nil {
			t.Fatal(err)
		}
		if err := calls[0].Wait(testContext(t), nil); err != nil {
			t.Fatal(err)
		}
		if got := len(events.C()) > 0; announced && !got {
			t.Error("stop was answered before STOP was announced")
		}
		var out struct{ Saved bool }
		if err := calls[1].Wait(testContext(t), &out); err != nil || !out.Saved {
			t.Errorf("save: %v, %v", out, err)
		}
		if e := <-events.C(); e.Name != "STOP" || e.Timestamp.UnixMicro() != 1700000000000007 {
			t.Errorf("event %+v", e)
		}
		if took := time.Since(d); took > eventPatience/2 {
			t.Errorf("took %v", took)
		}
	}
}

// A STOP that never comes holds the replies for a while, and no longer.
func TestRelayWithoutEvent(t *testing.T) {
	c, err := newManaged(t, &libvirttest.Daemon{Monitor: func(command string, _ *os.File) (string, error) {
		if executed(t, command) == "query-status" {
			return `{"return":{"running":true},"id":"x"}`, nil
		}
		return `{"return":{},"id":"x"}`, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Execute(testContext(t), "stop", nil, nil); err != nil {
		t.Error(err)
	}
	if err := c.Execute(testContext(t), "query-chardev", nil, nil); err != nil {
		t.Error(err)
	}
}

func TestRelayPassesDescriptors(t *testing.T) {
	c, err := newManaged(t, &libvirttest.Daemon{Monitor: func(command string, file *os.File) (string, error) {
		if executed(t, command) != "add-fd" || file == nil {
			return `{"error":{"class":"GenericError","desc":"no descriptor"},"id":"x"}`, nil
		}
		defer file.Close()
		b, err := io.ReadAll(file)
		return `{"return":{"fdset-id":` + string(b) + `},"id":"x"}`, err
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"4711", "4712"} {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte(want), 0); err != nil {
			t.Fatal(err)
		}
		var out struct {
			ID json.Number `json:"fdset-id"`
		}
		err = c.ExecuteFD(testContext(t), "add-fd", map[string]int{"fdset-id": 3}, &out, f)
		if err != nil || out.ID.String() != want {
			t.Errorf("%v, %v", out, err)
		}
		f.Close()
	}
	if err := c.Execute(testContext(t), "add-fd", nil, nil); err == nil || !strings.Contains(err.Error(), "no descriptor") {
		t.Errorf("without one: %v", err)
	}
}

func TestRelayRefusals(t *testing.T) {
	state := atomic.Int32{}
	d := &libvirttest.Daemon{
		State: func() (int32, int32) { return int32(libvirt.Paused), state.Load() },
		Monitor: func(command string, _ *os.File) (string, error) {
			switch executed(t, command) {
			case "of-qemu":
				return `{"id":"libvirt-9","error":{"class":"CommandNotFound","desc":"no such command"}}`, nil
			case "while-saving":
				return "", &libvirt.Error{Code: 68, Message: "cannot acquire state change lock"}
			case "forbidden":
				return "", &libvirt.Error{Code: 88, Message: "access denied"}
			case "after-the-end":
				return "", &libvirt.Error{Code: 55, Message: "domain is not running"}
			}
			return `{"return":{},"id":"x"}`, nil
		},
	}
	c, err := newManaged(t, d)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if err := c.Execute(ctx, "of-qemu", nil, nil); !IsCommandNotFound(err) {
		t.Errorf("QEMU's own error: %v", err)
	}
	for command, class := range map[string]string{"while-saving": ClassLibvirtBusy, "forbidden": ClassLibvirt} {
		err := c.Execute(ctx, command, nil, nil)
		if e, ok := errors.AsType[*Error](err); !ok || e.Class != class {
			t.Errorf("%s: %v", command, err)
		}
		if busy := class == ClassLibvirtBusy; busy != problem.Is(err, problem.Busy) {
			t.Errorf("%s: code %v", command, problem.CodeOf(err))
		}
	}
	if err := c.Execute(ctx, "cont", nil, nil); err != nil {
		t.Errorf("cont of what no manager paused: %v", err)
	}
	state.Store(1)
	if err := c.Execute(ctx, "cont", nil, nil); !IsManagerPaused(err) {
		t.Errorf("cont over virsh suspend: %v", err)
	}
	if err := c.Execute(ctx, "after-the-end", nil, nil); !errors.Is(err, ErrLost) {
		t.Errorf("a domain that ended: %v", err)
	}
}

func TestOldLibvirt(t *testing.T) {
	if _, err := newManaged(t, &libvirttest.Daemon{Version: 8001000, Monitor: nil}); !errors.Is(err, errOldLibvirt) {
		t.Errorf("libvirt 8.1: %v", err)
	}
}

// The parser is reset in the middle of a command, as after a torn write.
func TestRelayReset(t *testing.T) {
	c, err := newManaged(t, &libvirttest.Daemon{Monitor: func(command string, _ *os.File) (string, error) {
		return `{"return":"` + executed(t, command) + `","id":"x"}`, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c.conn, `{"execute":"half`+"\xff\n"); err != nil {
		t.Fatal(err)
	}
	var name string
	if err := c.Execute(testContext(t), "whole", nil, &name); err != nil || name != "whole" {
		t.Errorf("%q, %v", name, err)
	}
}
