package qmp

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

// TestMonitorsOfCommandLines covers what the installed QEMU does not offer.
func TestMonitorsOfCommandLines(t *testing.T) {
	unixAt := func(via, path string) monitorSpec { return monitorSpec{via: via, path: path, address: "unix"} }
	for _, c := range []struct {
		args string
		mons []monitorSpec
		note string
	}{
		{args: `-chardev {"id":"m","backend":"socket","path":"/q","server":true,"wait":false} -mon m,mode=control`,
			mons: []monitorSpec{unixAt("-mon m", "/q")}},
		{args: `-chardev {"id":"m","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/q"}}}}} -mon {"chardev":"m","mode":"control"}`,
			mons: []monitorSpec{unixAt("-mon m", "/q")}},
		{args: `-chardev {"id":"m","backend":{"type":"socket","data":{"addr":{"type":"inet","data":{"host":"::1","port":"44"}},"server":true}}} -mon m,mode=control`,
			mons: []monitorSpec{{via: "-mon m", host: "::1", port: "44", address: "tcp"}}},
		{args: `-chardev {"id":"m","backend":{"type":"socket","data":{"addr":{"type":"fd","data":{"str":"9"}},"server":true}}} -mon m,mode=control`,
			mons: []monitorSpec{{via: "-mon m", fd: "9", address: "fd"}}},
		{args: `-chardev {"id":"m","backend":{"type":"socket","data":{"addr":{"type":"unix","path":"/q"},"server":false}}} -mon m,mode=control`,
			note: "instead of listening"},
		{args: `-qmp unix:/q`, note: "instead of listening"},
		{args: `-qmp telnet:localhost:44,server=on`, note: "telnet"},
		{args: `-chardev socket,id=m,path=/q,server=on,tls-creds=t -mon m,mode=control`, note: "TLS"},
		{args: `-mon nope,mode=control`, note: "no such character device"},
		{args: `-chardev pty,id=m -mon m,mode=control`, note: "pty"},
		{args: `-qmp pty -monitor stdio`, note: "pty"},
		{args: `-chardev socket,id=charmonitor,path=/x,server=on -mon chardev=charmonitor,mode=control -qmp unix:/q,server`,
			mons: []monitorSpec{{via: "-mon charmonitor", path: "/x", address: "unix", libvirt: true}, unixAt("-qmp", "/q")}},
	} {
		opts, err := cmdline.Parse(strings.Fields(c.args))
		if err != nil {
			t.Fatal(err)
		}
		mons, notes := monitors(opts)
		if diff := cmp.Diff(c.mons, mons, cmp.AllowUnexported(monitorSpec{}), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: %s", c.args, diff)
		}
		if text := strings.Join(notes, "; "); (text == "") != (c.note == "") || !strings.Contains(text, c.note) {
			t.Errorf("%s: notes %q", c.args, text)
		}
	}
}

func TestParseEndpoint(t *testing.T) {
	for in, want := range map[string]string{
		"/run/q.sock": "unix:/run/q.sock", "unix:rel": "unix:rel", "unix:@abs": "unix:@abs", "q.sock": "unix:q.sock",
		"tcp:localhost:44": "tcp:localhost:44", "tcp:[::1]:44": "tcp:[::1]:44", "tcp::44": "tcp:localhost:44", "/a:b": "unix:/a:b",
	} {
		e, err := ParseEndpoint(in)
		if err != nil || e.String() != want || e.FD != -1 {
			t.Errorf("%q: %+v, %v", in, e, err)
		}
	}
	for _, in := range []string{"", "unix:", "@", "tcp:x", "tcp:x:", "vsock:3", "a\x00b"} {
		if e, err := ParseEndpoint(in); !problem.Is(err, problem.Usage) {
			t.Errorf("%q: %+v, %v", in, e, err)
		}
	}
}

func FuzzMonitors(f *testing.F) {
	f.Add("-qmp\nunix:/q,server=on\n-chardev\n{\"id\":\"m\",\"backend\":\"socket\",\"path\":\"/q\"}\n-mon\nm,mode=control")
	f.Add("-qmp\ntcp:[::1]:44,server\n-set\nchardev.m.path=x\n-qmp\nchardev:m\n-chardev\nsocket,id=m,fd=3")
	f.Fuzz(func(t *testing.T, text string) {
		opts, err := cmdline.Parse(strings.Split(text, "\n"))
		if err != nil {
			return
		}
		mons, _ := monitors(opts)
		for _, m := range mons {
			if m.address == "" {
				t.Fatalf("%q: %+v without an address", text, m)
			}
			e, why := (&view{pid: 1 << 30}).endpoint(m)
			if why == "" && e.Address == "" {
				t.Fatalf("%q: %+v", text, e)
			}
		}
	})
}
