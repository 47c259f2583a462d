package qmp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

const opDiscover = "find a QMP monitor"

// Discover lists the QMP monitors of a QEMU process that a further client can
// connect to, as its command line, the configuration files that names, and its
// sockets tell. It connects to none of them: an unknown socket might be a
// debugger's, and connecting to that stops the guest. Without any, the error is
// problem.Refused and says why each monitor found does not count.
func Discover(ctx context.Context, pid int) ([]Endpoint, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	object := fmt.Sprintf("pid %d", pid)
	raw, err := readProc(pid, "cmdline")
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return nil, problem.New(problem.NotFound, opDiscover, object, "no such process")
		}
		return nil, problem.New(problem.Failed, opDiscover, object, "%w", err)
	}
	if len(raw) == 0 {
		return nil, problem.New(problem.NotFound, opDiscover, object, "it has no command line: it has exited, or is no program")
	}
	args := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	opts, err := cmdline.Parse(args[1:])
	if err != nil {
		return nil, problem.New(problem.Refused, opDiscover, object, "%w", err).
			WithHint("its command line is not QEMU's; give the monitor with --qmp")
	}
	var notes []string
	opts, notes = withConfigFiles(pid, opts)
	mons, more := monitors(opts)
	notes = append(notes, more...)
	v := &view{pid: pid}
	if v.held, err = sockets(pid); err != nil {
		notes = append(notes, "its descriptors cannot be listed: "+err.Error())
	}
	v.read()
	v.cwd, _ = os.Readlink(procPath(pid, "cwd"))
	var eps []Endpoint
	for _, m := range mons {
		e, why := v.endpoint(m)
		if why != "" {
			notes = append(notes, m.via+": "+why)
		} else if !slices.ContainsFunc(eps, func(o Endpoint) bool {
			return o.Network == e.Network && o.Address == e.Address
		}) {
			eps = append(eps, e)
		}
	}
	if len(eps) > 0 {
		// A monitor of one's own is quicker than the way through libvirt.
		slices.SortStableFunc(eps, func(a, b Endpoint) int {
			return map[bool]int{true: 1}[a.Libvirt] - map[bool]int{true: 1}[b.Libvirt]
		})
		return eps, nil
	}
	p := problem.New(problem.Refused, opDiscover, object, "it has none that can be connected to")
	if len(notes) > 0 {
		p.Err = fmt.Errorf("%w: %s", p.Err, strings.Join(notes, "; "))
	}
	return nil, p.WithHint("start QEMU with -qmp unix:PATH,server=on,wait=off, or name its monitor with --qmp")
}

// monitorSpec is a monitor as configured.
type monitorSpec struct {
	via     string
	path    string // unix
	tight   bool   // abstract: the name is not padded
	host    string
	port    string
	to      string // tcp: the last port of a range
	fd      string
	libvirt bool
	address string // "unix", "abstract", "tcp", "fd"
}

// monitors is the part of Discover that only looks at options. notes say why a
// monitor is none for us.
func monitors(opts []cmdline.Option) (mons []monitorSpec, notes []string) {
	chardevs := make(map[string]*cmdline.KeyVal)
	sets := []string{}
	for _, o := range opts {
		switch o.Name {
		case "chardev":
			if kv, err := o.KeyVal(); err == nil {
				if id, ok := kv.Get("id"); ok {
					chardevs[id] = kv
				}
			}
		case "set":
			sets = append(sets, o.Value)
		}
	}
	for _, s := range sets { // -set chardev.ID.KEY=VALUE
		target, val, ok := strings.Cut(s, "=")
		f := strings.SplitN(target, ".", 3)
		if ok && len(f) == 3 && f[0] == "chardev" && chardevs[f[1]] != nil {
			chardevs[f[1]].Set(f[2], val)
		}
	}
	add := func(via string, kv *cmdline.KeyVal) {
		m, why := fromChardev(kv)
		m.via = via
		if why != "" {
			notes = append(notes, via+": "+why)
			return
		}
		mons = append(mons, m)
	}
	named := func(via, id string) {
		if kv := chardevs[id]; kv != nil {
			add(via, kv)
		} else {
			notes = append(notes, via+": no such character device")
		}
	}
	human := false
	for _, o := range opts {
		switch o.Name {
		case "qmp", "qmp-pretty":
			via := "-" + o.Name
			if id, ok := strings.CutPrefix(o.Value, "chardev:"); ok {
				named(via+" chardev:"+id, id)
				continue
			}
			kv, why := compatChardev(o.Value)
			if why != "" {
				notes = append(notes, via+": "+why)
				continue
			}
			add(via, kv)
		case "mon":
			kv, err := o.KeyVal()
			if err != nil {
				continue
			}
			id, _ := kv.Get("chardev")
			if mode, _ := kv.Get("mode"); mode == "control" {
				named("-mon "+id, id)
			} else {
				human = true
			}
		case "monitor":
			human = human || o.Value != "none"
		}
	}
	if human && len(mons) == 0 {
		notes = append(notes, "its human monitor does not speak QMP")
	}
	return mons, notes
}

// compatChardev turns the short form of a character device that -qmp takes
// ("unix:PATH,server=on") into that of -chardev.
func compatChardev(s string) (*cmdline.KeyVal, string) {
	s = strings.TrimPrefix(s, "mon:")
	kind, rest, _ := strings.Cut(s, ":")
	switch kind {
	case "unix":
		kv, err := cmdline.ParseKeyVal(rest, "path")
		if err != nil {
			return nil, err.Error()
		}
		kv.Set("backend", "socket")
		return kv, ""
	case "tcp", "telnet", "tn3270", "websocket":
		addr, more, _ := strings.Cut(rest, ",")
		i := strings.LastIndexByte(addr, ':')
		if i < 0 {
			return nil, "no port"
		}
		kv, err := cmdline.ParseKeyVal(more, "")
		if err != nil {
			return nil, err.Error()
		}
		kv.Set("backend", "socket")
		kv.Set("host", addr[:i])
		kv.Set("port", addr[i+1:])
		if kind != "tcp" {
			kv.Set(kind, "on")
		}
		return kv, ""
	case "stdio":
		return nil, "on its standard input and output, which belong to whoever started it"
	case "none", "null":
		return nil, "switched off"
	}
	return nil, fmt.Sprintf("on a character device of kind %q, which cannot be connected to", kind)
}

// fromChardev understands the flat form and the nested one of QMP's chardev-add.
func fromChardev(kv *cmdline.KeyVal) (m monitorSpec, why string) {
	get := func(key string) string {
		for _, prefix := range []string{"", "addr.", "addr.data.", "backend.data.", "backend.data.addr.data.", "backend.data.addr.", "backend.", "backend.addr."} {
			if v, ok := kv.Get(prefix + key); ok {
				return v
			}
		}
		return ""
	}
	backend := ""
	for _, key := range []string{"backend", "backend.type", "type"} {
		if v, ok := kv.Get(key); ok {
			backend = v
			break
		}
	}
	id, _ := kv.Get("id")
	switch {
	case backend == "stdio":
		return m, "on its standard input and output, which belong to whoever started it"
	case backend != "socket":
		return m, fmt.Sprintf("on a character device of kind %q, which cannot be connected to", backend)
	}
	m.path, m.host, m.port, m.to = get("path"), get("host"), get("port"), get("to")
	m.fd = get("fd")
	kind := ""
	for _, key := range []string{"backend.data.addr.type", "backend.addr.type", "addr.type"} {
		if v, ok := kv.Get(key); ok {
			kind = v
		}
	}
	if kind == "fd" && m.fd == "" {
		m.fd = get("str")
	}
	// libvirt's own monitor has this name since ever, wherever its socket is.
	m.libvirt = id == "charmonitor" || strings.Contains(m.path, "/libvirt/qemu/")
	server, nested := get("server"), kind != ""
	switch {
	case m.fd == "" && server != "on" && (server != "" || !nested): // nested: on by default
		return m, "QEMU connects to somebody there instead of listening"
	case on(get("telnet")) || on(get("tn3270")) || on(get("websocket")):
		return m, "wrapped in telnet or websocket"
	case get("tls-creds") != "":
		return m, "wrapped in TLS"
	case m.fd != "":
		m.address = "fd"
	case m.path != "" && on(get("abstract")):
		m.address = "abstract"
		m.tight = get("tight") == "" || on(get("tight"))
	case m.path != "":
		m.address = "unix"
	case m.port != "":
		m.address = "tcp"
	default:
		return m, "no address"
	}
	return m, ""
}

func on(v string) bool { return v == "on" || v == "yes" || v == "true" || v == "y" }

// maxConfigFiles bounds how many -readconfig files are looked at.
const maxConfigFiles = 32

// withConfigFiles puts in the place of each -readconfig what its file says, and
// the host-wide file in front.
func withConfigFiles(pid int, opts []cmdline.Option) (all []cmdline.Option, notes []string) {
	userConfig := true
	files := 0
	for _, o := range opts {
		if o.Name == "no-user-config" || o.Name == "nodefconfig" {
			userConfig = false
		}
	}
	if userConfig {
		if more, err := configFile(pid, "/etc/qemu/qemu.conf"); err == nil {
			all = append(all, more...)
		}
	}
	for _, o := range opts {
		if o.Name != "readconfig" {
			all = append(all, o)
			continue
		}
		if files++; files > maxConfigFiles {
			notes = append(notes, "more configuration files than are looked at")
			continue
		}
		more, err := configFile(pid, o.Value)
		if err != nil {
			notes = append(notes, fmt.Sprintf("-readconfig %s: %v", o.Value, err))
			continue
		}
		all = append(all, more...)
	}
	return all, notes
}

func configFile(pid int, path string) ([]cmdline.Option, error) {
	dir, resolve := "root", uint64(unix.RESOLVE_IN_ROOT)
	if !filepath.IsAbs(path) {
		dir, resolve = "cwd", 0
	}
	at, err := unix.Open(procPath(pid, dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(at)
	// Not blocking: the name may have become that of a pipe.
	fd, err := unix.Openat2(at, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: resolve})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("not a regular file"))
	}
	return cmdline.ParseConfig(io.Reader(f))
}
