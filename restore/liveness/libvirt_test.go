package liveness

import (
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ckagent/ckagent/agent/libvirt"
	"github.com/ckagent/ckagent/agent/libvirt/libvirttest"
)

func TestLibvirt(t *testing.T) {
	const uuid = "6D1B2E58-6f0f-4a6c-9d38-0f7a2f1f6a10"
	domain := libvirt.Domain{Name: "demo", ID: -1,
		UUID: [16]byte{0x6d, 0x1b, 0x2e, 0x58, 0x6f, 0x0f, 0x4a, 0x6c, 0x9d, 0x38, 0x0f, 0x7a, 0x2f, 0x1f, 0x6a, 0x10}}
	for _, c := range []struct {
		name      string
		state     libvirt.State
		autostart uint32
		uuid      string
		doubt     string // empty: none
	}{
		{"running", libvirt.Running, 0, uuid, "demo is running"},
		{"paused", libvirt.Paused, 0, uuid, "demo is paused"},
		{"shut off", libvirt.ShutOff, 0, uuid, ""},
		{"crashed", libvirt.Crashed, 0, uuid, ""},
		{"autostart", libvirt.ShutOff, 1, uuid, "by itself"},
		{"unknown to it", libvirt.Running, 1, strings.Repeat("0", 32), ""},
		{"no UUID", libvirt.ShutOff, 0, "", "not recorded"},
	} {
		var state atomic.Int32
		state.Store(int32(c.state))
		d := &libvirttest.Daemon{Domain: domain, Autostart: c.autostart, State: func() (int32, int32) { return state.Load(), 0 }}
		socket := filepath.Join(t.TempDir(), "sock")
		if err := d.Listen(socket); err != nil {
			t.Fatal(err)
		}
		doubt, ok := Libvirt(t.Context(), socket, "qemu:///system", c.uuid)
		if ok != (c.doubt != "") || !strings.Contains(doubt.What, c.doubt) {
			t.Errorf("%s: %v, %q", c.name, ok, doubt.What)
		}
		d.Close()
		if doubt, ok := Libvirt(t.Context(), socket, "qemu:///system", uuid); !ok || !strings.Contains(doubt.What, "cannot be asked") {
			t.Errorf("%s, its daemon gone: %v, %q", c.name, ok, doubt.What)
		}
	}
}
