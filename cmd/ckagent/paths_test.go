package main

import (
	"io"
	"testing"
)

// TestPathsForOthers: paths that processes in other directories are told mean what they
// mean to whoever wrote them.
func TestPathsForOthers(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	o := restoreOptions{qmp: "q.sock", binary: "./qemu", secrets: []string{"s=key"}, disks: "checkpoint", clock: "guest"}
	r, err := o.options(nil)
	if err != nil || r.QMPPath != dir+"/q.sock" || r.Binary != dir+"/qemu" || r.Secrets["s"] != dir+"/key" {
		t.Errorf("restore: %+v, %v", r, err)
	}
	if r, err = (&restoreOptions{disks: "checkpoint", clock: "guest"}).options(nil); err != nil || r.QMPPath != "" || r.Binary != "" {
		t.Errorf("restore, none given: %+v, %v", r, err)
	}
	var f captureFlags
	c := newCheckpointCommand(&app{out: io.Discard, err: io.Discard})
	f.overlayDir = "overlays"
	if s := f.spec(c); s.GetOverlayDir() != dir+"/overlays" {
		t.Errorf("checkpoint: %q", s.GetOverlayDir())
	}
	for in, want := range map[string]string{"": "", "q.sock": "unix:" + dir + "/q.sock", "unix:./q.sock": "unix:" + dir + "/q.sock",
		"/q.sock": "/q.sock", "unix:@name": "unix:@name", "tcp:h:1": "tcp:h:1", "what:x": "what:x"} {
		if f.qmp = in; f.spec(c).GetQmp() != want {
			t.Errorf("monitor %q: %q, want %q", in, f.spec(c).GetQmp(), want)
		}
	}
	f.overlayDir = ""
	if s := f.spec(c); s.GetOverlayDir() != "" {
		t.Errorf("checkpoint, none given: %q", s.GetOverlayDir())
	}
}
