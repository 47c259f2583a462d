package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// netLine is a backend in `info network`: " \ net0: index=0,type=user,net=...".
var netLine = regexp.MustCompile(`^\s*(?:\\ )?([^\s:]+): index=\d+,type=([a-z0-9-]+)(?:,(.*))?$`)

// networks compares -netdev with the backends there are.
func (d *describer) networks(ctx context.Context) error {
	text, err := d.t.QMP.HMP(ctx, "info network")
	if err != nil {
		return err
	}
	type backend struct {
		typ, info string
		queues    int
	}
	live := make(map[string]backend)
	for line := range strings.Lines(text) {
		m := netLine.FindStringSubmatch(strings.TrimRight(line, "\r\n"))
		if m == nil || m[2] == "nic" || m[2] == "hubport" || strings.HasPrefix(m[1], "#") {
			continue
		}
		live[m[1]] = backend{m[2], m[3], live[m[1]].queues + 1}
	}
	for _, l := range d.c.named("netdev") {
		id, _ := l.kv.Get("id")
		if _, ok := live[id]; !ok {
			typ, _ := l.kv.Get("type")
			if typ == "hubport" {
				continue
			}
			if d.c.editable(l, id, "it was deleted") {
				d.c.remove(l.index, "network backend "+id+" was deleted")
			}
			continue
		}
		delete(live, id)
	}
	for _, l := range d.c.named("nic", "net") {
		if id, ok := l.kv.Get("id"); ok {
			delete(live, id)
		}
	}
	ids := make([]string, 0, len(live))
	for id := range live {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		b, arg := live[id], ""
		// Of a tap everything that matters is told. A user network's mask, name
		// servers and forwardings are not, and are not guessed.
		if b.typ == "tap" && b.queues == 1 {
			arg = tapArgument(id, b.info)
		}
		if arg == "" {
			d.c.refuse("added-netdev", id, "a "+b.typ+" backend was added at run time, and QEMU does not tell all of its options",
				"start the VM with it on the command line")
			continue
		}
		d.c.add(cmdline.Option{Name: "netdev", Value: arg, HasValue: true}, "network backend "+id+" was added")
	}
	return nil
}

// tapArgument makes a -netdev value of an `info network` line, "" without a name.
func tapArgument(id, info string) string {
	kv, err := cmdline.ParseKeyVal("tap", "type")
	if err != nil {
		return ""
	}
	kv.Set("id", id)
	for _, part := range strings.Split(info, ",") {
		if k, v, ok := strings.Cut(part, "="); ok && slices.Contains([]string{"ifname", "script", "downscript"}, k) && v != "" {
			kv.Set(k, v)
		}
	}
	if _, named := kv.Get("ifname"); !named {
		return ""
	}
	return kv.String()
}

// impliedChardev are labels that options other than -chardev make.
var impliedChardev = regexp.MustCompile(`^(compat_monitor|serial|parallel|virtcon|vc|con|sclpcon|hvc|mon|debugcon|gdb|terminal|monitor)\d*$|^gdb$`)

// chardevs compares -chardev with the character devices there are.
func (d *describer) chardevs(ctx context.Context) error {
	var list []struct {
		Label    string `json:"label"`
		Filename string `json:"filename"`
	}
	if err := d.t.QMP.Execute(ctx, "query-chardev", nil, &list); err != nil {
		return fmt.Errorf("query-chardev: %w", err)
	}
	live := make(map[string]string)
	for _, ch := range list {
		live[ch.Label] = ch.Filename
	}
	known := make(map[string]bool)
	for _, l := range d.c.named("chardev") {
		id, _ := l.kv.Get("id")
		known[id] = true
		if _, ok := live[id]; !ok && d.c.editable(l, id, "it was removed") {
			d.c.remove(l.index, "character device "+id+" was removed")
		}
	}
	for _, ch := range list {
		if known[ch.Label] || impliedChardev.MatchString(ch.Label) {
			continue
		}
		kind, _, _ := strings.Cut(ch.Filename, ":")
		if kind != "null" && kind != "ringbuf" {
			d.c.refuse("added-chardev", ch.Label, "it was added at run time ("+ch.Filename+"), and QEMU does not tell all of its options",
				"start the VM with it on the command line")
			continue
		}
		d.c.add(cmdline.Option{Name: "chardev", Value: kind + ",id=" + cmdline.Escape(ch.Label), HasValue: true},
			"character device "+ch.Label+" was added")
	}
	return nil
}

// descriptors turns inherited descriptors into what they stand for, or refuses:
// a number means nothing to a new process.
func (d *describer) descriptors(ctx context.Context) error {
	fds, err := d.t.Process.FDs()
	if err != nil {
		return fmt.Errorf("descriptors: %w", err)
	}
	open := make(map[int]FD, len(fds))
	for _, fd := range fds {
		open[fd.Number] = fd
	}
	sets, err := d.descriptorSets(ctx)
	if err != nil {
		return err
	}
	for _, l := range d.c.named("netdev", "chardev", "object", "device", "drive", "blockdev", "net", "nic", "spice", "vnc", "mon", "fsdev", "tpmdev") {
		id, _ := l.kv.Get("id")
		what := strings.TrimSpace("-" + l.opt.Name + " " + id)
		for _, key := range l.kv.Keys() {
			val, _ := l.kv.Get(key)
			last := key[strings.LastIndexByte(key, '.')+1:]
			switch {
			case strings.HasPrefix(val, "/dev/fdset/") && d.fileByName(l, key, what, sets[val], open):
			case strings.HasPrefix(val, "/dev/fdset/") && l.opt.Name == "chardev" && (last == "path" || last == "logfile"):
				// A pipe to whoever keeps the log (virtlogd): a restore logs by itself.
			case strings.HasPrefix(val, "/dev/fdset/"):
				d.c.refuse("inherited-descriptor", what, key+" names a descriptor set, which ends with the process", "name the file itself")
			case last == "fd" && l.opt.Name == "netdev" && d.tapByName(l, open, val):
			case last == "fd" && l.opt.Name == "chardev" && d.socketByName(ctx, l, id):
			case last == "vhost" && val == "on", last != "fd" && last != "fds" && last != "vhostfd" && last != "vhostfds":
			case last == "vhostfd" || last == "vhostfds":
				if d.c.editable(l, what, "it inherits a descriptor") {
					l.kv.Delete(key)
					d.c.set(l.index, l.kv, what+": the inherited vhost descriptor is opened anew")
				}
			default:
				d.c.refuse("inherited-descriptor", what, key+"="+val+" is a descriptor inherited from whoever started QEMU, and what it is cannot be named",
					"let QEMU open it by name")
			}
		}
	}
	for i, o := range d.c.opts {
		if o.Name == "add-fd" { // who used it was looked at above
			d.c.remove(i, "descriptors given at the start end with the process")
		}
	}
	return nil
}

// descriptorSets lists the descriptors in each set, by the name of the set.
func (d *describer) descriptorSets(ctx context.Context) (map[string][]int, error) {
	var list []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			FD int `json:"fd"`
		} `json:"fds"`
	}
	if err := d.t.QMP.Execute(ctx, "query-fdsets", nil, &list); err != nil {
		return nil, fmt.Errorf("query-fdsets: %w", err)
	}
	sets := make(map[string][]int, len(list))
	for _, s := range list {
		name := "/dev/fdset/" + strconv.Itoa(s.ID)
		for _, fd := range s.FDs {
			sets[name] = append(sets[name], fd.FD)
		}
	}
	return sets, nil
}

// fileByName replaces a descriptor set by the file that is open in it, if it is
// one that can be opened by its name again.
func (d *describer) fileByName(l located, key, what string, set []int, open map[int]FD) bool {
	if l.index < 0 || len(set) == 0 {
		return false
	}
	path := open[set[0]].Target
	if !filepath.IsAbs(path) {
		return false // a pipe, a socket, a memfd
	}
	is, err := os.Stat(d.t.Process.Path("fd/" + strconv.Itoa(set[0])))
	if err != nil || is.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 {
		return false
	}
	named, err := os.Stat(path) // whoever opened it need not see what QEMU sees
	if err != nil || !os.SameFile(is, named) {
		return false
	}
	l.kv.Set(key, path)
	d.c.set(l.index, l.kv, what+": the inherited descriptor is the file "+path)
	return true
}

// tapByName replaces a tap's descriptor by the interface's name.
func (d *describer) tapByName(l located, open map[int]FD, val string) bool {
	n, err := strconv.Atoi(val)
	if err != nil {
		return false
	}
	name := open[n]
	ifname := name.infoField("iff")
	if ifname == "" || l.index < 0 {
		return false
	}
	l.kv.Delete("fd")
	l.kv.Set("ifname", ifname)
	l.kv.Set("script", "no")
	l.kv.Set("downscript", "no")
	d.c.set(l.index, l.kv, "the inherited descriptor is the tap interface "+ifname)
	return true
}

// socketByName replaces a listening socket's descriptor by its path, as QEMU
// itself tells it.
func (d *describer) socketByName(ctx context.Context, l located, id string) bool {
	var list []struct {
		Label    string `json:"label"`
		Filename string `json:"filename"`
	}
	if err := d.t.QMP.Execute(ctx, "query-chardev", nil, &list); err != nil || l.index < 0 {
		return false
	}
	for _, ch := range list {
		rest, ok := strings.CutPrefix(strings.TrimPrefix(ch.Filename, "disconnected:"), "unix:")
		path, tail, _ := strings.Cut(rest, ",")
		if ch.Label != id || !ok || !strings.Contains(tail, "server=on") && !strings.Contains(tail, "server") || !strings.HasPrefix(path, "/") {
			continue
		}
		l.kv.Delete("fd")
		l.kv.Set("path", path)
		l.kv.Set("server", "on")
		l.kv.Set("wait", "off")
		d.c.set(l.index, l.kv, "the inherited descriptor is the socket "+path)
		return true
	}
	return false
}

// fileKeys are option keys that name a file QEMU reads when it starts.
var fileKeys = map[string][]string{
	"drive": {"file"}, "blockdev": {"filename", "file.filename"}, "object": {"file", "filename", "mem-path", "dir"},
	"fw_cfg": {"file"}, "smbios": {"file"}, "acpitable": {"file", "data"}, "option-rom": {"romfile"}, "device": {"romfile"},
}

// fileOptions are options whose whole value is such a file.
var fileOptions = map[string]bool{
	"kernel": true, "dtb": true, "pflash": true, "cdrom": true, "readconfig": true, "mem-path": true,
	"hda": true, "hdb": true, "hdc": true, "hdd": true, "fda": true, "fdb": true, "shim": true,
}

// files refuses what names a file that is gone: the machine runs without it, but
// could not be started again.
func (d *describer) files() {
	check := func(what, path string) {
		path = strings.TrimPrefix(path, "file:")
		switch {
		case path == "", strings.Contains(path, "://"), strings.HasPrefix(path, "json:"), strings.HasPrefix(path, "/dev/fdset/"), strings.HasPrefix(path, "@ckagent"):
			return
		case !strings.HasPrefix(path, "/") && strings.Contains(path, ":"):
			return // a protocol: nbd:, fat:, rbd:
		}
		if _, err := os.Stat(d.t.Process.Outside(path)); errors.Is(err, os.ErrNotExist) {
			d.c.refuse("missing-file", path, what+" names it, but it is gone: the VM could not be started again", "put the file back, or start the VM without it")
		}
	}
	for i, o := range d.c.opts {
		if d.c.gone[i] || !o.HasValue {
			continue
		}
		if fileOptions[o.Name] {
			check("-"+o.Name, o.Value)
			continue
		}
		if o.Name == "initrd" { // multiboot modules: "file arguments,file arguments"
			for _, module := range strings.Split(o.Value, ",") {
				file, _, _ := strings.Cut(module, " ")
				check("-initrd", file)
			}
			continue
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		for _, key := range fileKeys[o.Name] {
			val, ok := kv.Get(key)
			if !ok || o.Name == "device" && !strings.Contains(val, "/") {
				continue // a bare ROM name is looked up among QEMU's own
			}
			check("-"+o.Name+" "+key, val)
		}
	}
}
