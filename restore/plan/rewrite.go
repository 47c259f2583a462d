package plan

import (
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// Options whose plain value is a file or directory.
var pathOptions = map[string]bool{
	"kernel": true, "initrd": true, "dtb": true, "bios": true, "pidfile": true, "D": true, "L": true,
	"cdrom": true, "hda": true, "hdb": true, "hdc": true, "hdd": true, "fda": true, "fdb": true,
	"pflash": true, "mtdblock": true, "sd": true, "chroot": true, "shim": true, "mem-path": true,
}

// Options whose plain value is a character device in the old syntax:
// "unix:PATH,server,nowait", "tcp:HOST:PORT", "file:PATH", "mon:stdio".
var legacyDevOptions = map[string]bool{
	"serial": true, "parallel": true, "monitor": true, "qmp": true, "qmp-pretty": true,
	"debugcon": true, "gdb": true, "virtioconsole": true, "qtest": true,
}

// Options whose value is the guest's own business, apart from the keys named.
var guestText = map[string][]string{
	"append": nil, "name": nil, "uuid": nil, "m": nil, "smp": nil, "cpu": nil, "rtc": nil,
	"smbios": {"file"}, "fw_cfg": {"file"},
}

// Keys that hold a path even when it has no slash, or the name of an interface.
var pathKeys = map[string]bool{
	"ifname": true, "br": true,
	"file": true, "filename": true, "path": true, "mem-path": true, "romfile": true,
	"file.filename": true, "logfile": true, "dir": true, "backing.file.filename": true,
}

// applyMap applies --map to every value it can mean.
func (b *builder) applyMap() error {
	for _, e := range b.opts {
		switch {
		case e.kv != nil:
			b.mapKeys(e)
		case pathOptions[e.Name]:
			b.setPlain(e, b.maps.path(e.Value, true))
		case legacyDevOptions[e.Name]:
			b.setPlain(e, b.mapLegacy(e.Value))
		}
	}
	return nil
}

func (b *builder) setPlain(e *entry, v string) {
	if v != e.Value {
		e.Value, e.mapped[""] = v, true
	}
}

func (b *builder) mapKeys(e *entry) {
	only, guest := guestText[e.Name]
	// The host a port belongs to is another key of the same option.
	host := e.get("host")
	if e.Name == "spice" {
		host = e.get("addr")
	}
	newHost := host
	e.kv.Rewrite(func(key, val string) string {
		if guest && !contains(only, key) {
			return val
		}
		out := val
		switch key {
		case "port", "tls-port", "to", "websocket", "localport":
			if isPort(val) {
				h, p := b.maps.port(host, val)
				if h != host {
					newHost = h
				}
				out = p
			}
		case "hostfwd":
			out = b.maps.hostForward(val)
		case "listen", "connect", "mcast", "udp", "localaddr":
			out = b.maps.address(val)
		case "vnc":
			out = b.mapVNC(val)
		}
		if out == val {
			out = b.maps.path(val, pathKeys[key])
		}
		if out != val {
			e.mapped[key] = true
		}
		return out
	})
	if newHost != host {
		key := "host"
		if e.Name == "spice" {
			key = "addr"
		}
		e.kv.Set(key, newHost)
	}
}

// mapVNC maps the display of -vnc: HOST:DISPLAY is port 5900 + DISPLAY.
func (b *builder) mapVNC(val string) string {
	n := strings.LastIndexByte(val, ':')
	if n < 0 {
		return val
	}
	disp, ok := vncPort(val[n+1:])
	if !ok {
		return val
	}
	host, port := b.maps.port(val[:n], disp)
	if port == disp && host == val[:n] {
		return val
	}
	d, ok := vncDisplay(port)
	if !ok {
		return val
	}
	return host + ":" + d
}

// mapLegacy maps a character device in the old syntax.
func (b *builder) mapLegacy(val string) string {
	prefix := ""
	rest := val
	if r, ok := strings.CutPrefix(rest, "mon:"); ok {
		prefix, rest = "mon:", r
	}
	scheme, addr, ok := strings.Cut(rest, ":")
	if !ok {
		return b.maps.path(val, false)
	}
	switch scheme {
	case "tcp", "telnet", "websocket", "udp", "tn3270":
		// udp:[host]:port[@[src]:port] - each side by itself.
		to, from, both := strings.Cut(addr, "@")
		out := b.maps.address(to)
		if both {
			out += "@" + b.maps.address(from)
		}
		return prefix + scheme + ":" + out
	case "unix":
		kv, err := cmdline.ParseKeyVal(addr, "path")
		if err != nil {
			return val
		}
		kv.Rewrite(func(key, v string) string {
			if key == "path" {
				return b.maps.path(v, true)
			}
			return v
		})
		return prefix + scheme + ":" + kv.String()
	case "file", "pipe":
		return prefix + scheme + ":" + b.maps.path(addr, true)
	}
	return b.maps.path(val, false)
}

// legacyDev is a character device in the old syntax, taken apart.
type legacyDev struct {
	mux    bool   // "mon:"
	scheme string // unix, tcp, telnet, file, pipe, udp; "" for a bare word or path
	addr   string
	opts   *cmdline.KeyVal // of sockets: server, nowait, ... and of unix ones the path
}

// socket is what makes a socket of it again: the inverse of parseLegacy.
func (d legacyDev) socket() string {
	s := d.scheme + ":"
	if d.scheme != "unix" {
		s += d.addr + ","
	}
	return s + d.opts.String()
}

func parseLegacy(val string) legacyDev {
	var d legacyDev
	if r, ok := strings.CutPrefix(val, "mon:"); ok {
		d.mux, val = true, r
	}
	scheme, addr, ok := strings.Cut(val, ":")
	if !ok {
		d.addr = val
		return d
	}
	switch scheme {
	case "unix": // a comma of the path is doubled
		d.scheme = scheme
		d.opts, _ = cmdline.ParseKeyVal(addr, "path")
		if d.opts != nil {
			d.addr, _ = d.opts.Get("path")
		}
	case "tcp", "telnet", "websocket", "tn3270":
		d.scheme = scheme
		a, o, _ := strings.Cut(addr, ",")
		d.addr = a
		d.opts, _ = cmdline.ParseKeyVal(o, "")
	case "file", "pipe", "udp":
		d.scheme, d.addr = scheme, addr
	default:
		d.addr = val
	}
	return d
}

func (d legacyDev) server() bool {
	if d.opts == nil {
		return false
	}
	v, ok := d.opts.Get("server")
	return ok && isOn(v)
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
