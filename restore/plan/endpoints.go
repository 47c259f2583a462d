package plan

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// endpoints treats everything through which the host talks to the VM: character
// devices, monitors, displays. Sockets come back at their recorded addresses and
// never make the start wait for a client; logs are appended to, not truncated;
// what was inherited as a descriptor gets a socket in the run directory. A clone
// shares none of it with the original: what was not mapped moves into the run
// directory or to nowhere.
func (b *builder) endpoints() error {
	for e := range b.named("chardev") {
		if err := b.chardev(e); err != nil {
			return err
		}
	}
	for _, e := range append([]*entry(nil), b.opts...) {
		if legacyDevOptions[e.Name] {
			if err := b.legacyDevice(e); err != nil {
				return err
			}
		}
	}
	b.drop(func(e *entry) bool { return e.Name == "" })
	for e := range b.named("vnc", "spice", "display") {
		if err := b.display(e); err != nil {
			return err
		}
	}
	b.drop(func(e *entry) bool {
		if b.opt.CloneID == "" || e.mapped[""] {
			return false
		}
		return e.Name == "pidfile" || e.Name == "D" || e.Name == "qtest-log"
	})
	return nil
}

// chardev treats one -chardev.
func (b *builder) chardev(e *entry) error {
	backend, id := e.get("backend"), e.get("id")
	clone := b.opt.CloneID != ""
	toNull := func(why string) {
		b.change("-chardev "+id+": null instead of "+backend, why)
		keep := e.get("mux")
		e.kv, _ = cmdline.ParseKeyVal("null,id="+cmdline.Escape(id), "backend")
		if keep != "" {
			e.kv.Set("mux", keep)
		}
	}
	if log := e.get("logfile"); log != "" && !e.mapped["logfile"] {
		if clone || inheritedFD(log) {
			e.kv.Set("logfile", b.own(id+".log"))
			b.change("-chardev "+id+": logfile="+b.own(id+".log"), "a copy of what is said must not go where the original's goes")
		}
		e.kv.SetBool("logappend", true)
	}
	switch backend {
	case "socket":
		server := e.isOn("server")
		if _, fd := e.kv.Get("fd"); fd {
			if !server {
				toNull("the connection it inherited is gone")
				return nil
			}
			e.kv.Delete("fd")
			b.ownSocket(e, id, "the socket it inherited is gone")
			return nil
		}
		if !server {
			if clone && !e.mapped["path"] && !e.mapped["port"] {
				toNull("a clone must not talk to the original's peers; map it to connect it")
			}
			return nil
		}
		if w, ok := e.kv.Get("wait"); !ok || isOn(w) {
			e.kv.SetBool("wait", false)
			b.change("-chardev "+id+": wait=off", "the guest must not wait for a client")
		}
		if clone && !e.mapped["path"] && !e.mapped["port"] {
			b.ownSocket(e, id, "a clone has sockets of its own")
			return nil
		}
		if path := e.get("path"); path != "" {
			if isOn(e.get("abstract")) {
				path = "@" + path
			}
			b.listen("unix", path, "-chardev "+id)
		} else {
			b.listen("tcp", e.get("host")+":"+e.get("port"), "-chardev "+id)
		}
	case "file":
		if inheritedFD(e.get("path")) || clone && !e.mapped["path"] {
			b.change("-chardev "+id+": path="+b.own(id+".log"), "the original's log is not this one's")
			e.kv.Set("path", b.own(id+".log"))
		}
		if !e.isOn("append") {
			e.kv.SetBool("append", true)
			b.change("-chardev "+id+": append=on", "what the VM wrote before it died is kept")
		}
		b.plan.Files = append(b.plan.Files, File{Path: b.abs(e.get("path")), Option: "-chardev " + id, Writable: true, Created: true})
	case "udp", "pipe", "serial", "tty", "parallel", "parport":
		if clone && len(e.mapped) == 0 {
			toNull("a clone must not share it with the original; map it to connect it")
		}
	}
	return nil
}

// ownSocket turns a listening chardev into a unix socket in the run directory.
func (b *builder) ownSocket(e *entry, id, why string) {
	path := b.own(id + ".sock")
	for _, key := range []string{"host", "port", "to", "ipv4", "ipv6", "abstract", "tight", "nodelay", "delay", "tls-creds", "tls-authz"} {
		e.kv.Delete(key)
	}
	e.kv.Set("path", path)
	e.kv.SetBool("wait", false)
	b.change("-chardev "+id+": path="+path, why)
}

// legacyDevice treats -serial, -monitor, -qmp and their kin.
func (b *builder) legacyDevice(e *entry) error {
	d := parseLegacy(e.Value)
	name := "-" + e.Name + " " + e.Value
	clone := b.opt.CloneID != "" && !e.mapped[""]
	mux := ""
	if d.mux {
		mux = "mon:"
	}
	if e.Name == "gdb" || e.Name == "qtest" {
		if clone {
			e.Name = "" // dropped by the caller
			b.change(name+" removed", "a clone does not share it")
		} else if d.scheme == "tcp" {
			b.listen("tcp", d.addr, "-"+e.Name)
		}
		return nil
	}
	switch d.scheme {
	case "unix", "tcp", "telnet", "websocket", "tn3270":
		if !d.server() {
			if clone {
				e.Value = "null"
				b.change(name+": null", "a clone must not talk to the original's peers; map it to connect it")
			}
			return nil
		}
		if clone {
			path := b.ownLegacy(e.Name, ".sock")
			e.Value = mux + "unix:" + cmdline.Escape(path) + ",server=on,wait=off"
			b.change("-"+e.Name+" "+e.Value, "a clone has sockets of its own")
			return nil
		}
		if w, ok := d.opts.Get("wait"); !ok || isOn(w) {
			d.opts.Set("wait", "off")
			e.Value = mux + d.socket()
			b.change("-"+e.Name+" "+e.Value, "the guest must not wait for a client")
		}
		if d.scheme == "unix" {
			b.listen("unix", d.addr, "-"+e.Name)
		} else {
			b.listen("tcp", d.addr, "-"+e.Name)
		}
	case "file":
		// The old syntax cannot append, and would empty the console log.
		path := d.addr
		if clone || inheritedFD(path) {
			path = b.ownLegacy(e.Name, ".log")
		}
		id := b.freshID(e.Name)
		b.append("chardev", "file,id="+id+",path="+cmdline.Escape(path)+",append=on")
		if d.mux {
			b.opts[len(b.opts)-1].kv.Set("mux", "on")
		}
		e.Value = mux + "chardev:" + id
		b.change("-"+e.Name+" to "+path+" appends", "what the VM wrote before it died is kept")
		b.plan.Files = append(b.plan.Files, File{Path: b.abs(path), Option: "-" + e.Name, Writable: true, Created: true})
	case "udp", "pipe":
		if clone {
			e.Value = "null"
			b.change(name+": null", "a clone must not share it with the original; map it to connect it")
		}
	case "":
		if clone && strings.HasPrefix(d.addr, "/dev/") {
			e.Value = "null"
			b.change(name+": null", "a clone must not share it with the original; map it to connect it")
		}
	}
	return nil
}

// earlier moves what an earlier restore of this VM had put into its run directory, which
// ended with that QEMU, into the one of this restore.
func (b *builder) earlier() error {
	root := filepath.Dir(b.opt.RunDir)
	gone, err := regexp.Compile(regexp.QuoteMeta(root) + "/[^/,]+/" + VMDir + "/")
	if err != nil || b.opt.RunDir == "" {
		return err
	}
	move := func(val string) string {
		at := gone.FindStringIndex(val)
		if at == nil {
			return val
		}
		to := val[:at[0]] + b.own("") + "/" + val[at[1]:]
		b.change(to, "the directory that an earlier restore had made for it is gone")
		return to
	}
	for e := range b.named("chardev", "vnc", "spice", "display") {
		e.kv.Rewrite(func(key, val string) string {
			if e.mapped[key] {
				return val
			}
			return move(val)
		})
	}
	for _, e := range b.opts {
		if legacyDevOptions[e.Name] && !e.mapped[""] {
			e.Value = move(e.Value)
		}
	}
	return nil
}

// ownLegacy is a path of its own for each of the devices of one option, which have no
// ids: of two on one socket, the second would take it away from the first.
func (b *builder) ownLegacy(option, ext string) string {
	b.legacy[option]++
	if n := b.legacy[option]; n > 1 {
		option += "-" + strconv.Itoa(n)
	}
	return b.own(option + ext)
}

// display treats graphical output.
func (b *builder) display(e *entry) error {
	clone := b.opt.CloneID != ""
	switch e.Name {
	case "vnc":
		addr := e.get("vnc")
		switch {
		case addr == "" || addr == "none":
		case clone && !e.mapped["vnc"]:
			e.kv.Set("vnc", "unix:"+b.own("vnc.sock"))
			e.kv.Delete("websocket")
			e.kv.Delete("to")
			b.change("-vnc unix:"+b.own("vnc.sock"), "a clone has a display of its own")
		case strings.HasPrefix(addr, "unix:"):
			b.listen("unix", addr[len("unix:"):], "-vnc")
		case !e.isOn("reverse"):
			if _, to := e.kv.Get("to"); to {
				break // it looks for a free one by itself
			}
			n := strings.LastIndexByte(addr, ':')
			if p, ok := vncPort(addr[n+1:]); ok && n >= 0 {
				b.listen("tcp", addr[:n]+":"+p, "-vnc")
			}
		}
	case "spice":
		if clone && !e.mapped["port"] && !e.mapped["addr"] && !e.mapped["tls-port"] {
			for _, key := range []string{"port", "tls-port", "ipv4", "ipv6"} {
				e.kv.Delete(key)
			}
			e.kv.Set("unix", "on")
			e.kv.Set("addr", b.own("spice.sock"))
			b.change("-spice unix:"+b.own("spice.sock"), "a clone has a display of its own")
			return nil
		}
		if e.isOn("unix") {
			b.listen("unix", e.get("addr"), "-spice")
			return nil
		}
		for _, key := range []string{"port", "tls-port"} {
			if p := e.get(key); isPort(p) {
				b.listen("tcp", e.get("addr")+":"+p, "-spice")
			}
		}
	case "display":
		switch t := e.get("type"); t {
		case "gtk", "sdl", "curses", "cocoa":
			// A window belongs to a terminal or a session that a restored VM,
			// which outlives both, has no part in.
			if t != "curses" && b.hasEnv("DISPLAY", "WAYLAND_DISPLAY") && !clone {
				return nil
			}
			e.kv, _ = cmdline.ParseKeyVal("none", "type")
			b.change("-display none", t+" needs a terminal or a desktop session")
		case "":
			if v := e.get("vnc"); v != "" && clone && !e.mapped["vnc"] {
				e.kv.Set("vnc", "unix:"+b.own("vnc.sock"))
				b.change("-display vnc=unix:"+b.own("vnc.sock"), "a clone has a display of its own")
			}
		}
	}
	return nil
}

func (b *builder) hasEnv(names ...string) bool {
	for _, kv := range b.rec.Env {
		name, _, _ := strings.Cut(kv, "=")
		if contains(names, name) {
			return true
		}
	}
	return false
}

// listen notes an address that must be free.
func (b *builder) listen(network, addr, option string) {
	if network == "unix" && !strings.HasPrefix(addr, "@") {
		addr = b.abs(addr)
	}
	b.plan.Listen = append(b.plan.Listen, Socket{Network: network, Address: addr, Option: option})
}

// collectOld notes the control sockets and images of the original, before
// anything is mapped: where they are in use, it may live.
func (b *builder) collectOld() {
	for e := range b.named("chardev") {
		if e.get("backend") == "socket" && e.isOn("server") {
			if p := e.get("path"); p != "" && !isOn(e.get("abstract")) {
				b.plan.OldUnix = append(b.plan.OldUnix, b.abs(p))
			}
		}
	}
	for e := range b.named("monitor", "qmp", "qmp-pretty", "serial") {
		if d := parseLegacy(e.Value); d.scheme == "unix" && d.server() {
			b.plan.OldUnix = append(b.plan.OldUnix, b.abs(d.addr))
		}
	}
	b.plan.OldFiles = b.images()
}

// inheritedFD reports a path that names a descriptor only the old process had.
func inheritedFD(path string) bool {
	return strings.HasPrefix(path, "/dev/fdset/") || strings.HasPrefix(path, "/dev/fd/") || strings.HasPrefix(filepath.Clean(path), "/proc/self/fd/")
}

func vncPort(display string) (string, bool) {
	n, err := strconv.ParseUint(display, 10, 16)
	if err != nil || n+5900 > 65535 {
		return "", false
	}
	return strconv.FormatUint(n+5900, 10), true
}

func vncDisplay(port string) (string, bool) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n < 5900 {
		return "", false
	}
	return strconv.FormatUint(n-5900, 10), true
}
