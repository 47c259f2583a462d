package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// media compares what is in every drive with what the command line puts there:
// changed, ejected and inserted discs, and images attached at run time. Writable
// ones are refused elsewhere; here only what a restore must open again counts.
func (d *describer) media(ctx context.Context, disks []Disk) error {
	for i := range disks {
		k := &disks[i]
		if k.Temporary {
			continue // refused as a writable disk
		}
		if l, ok := d.driveOption(k); ok {
			d.driveMedium(k, l)
			continue
		}
		if dev, ok := d.deviceOption(k); ok {
			if err := d.nodeMedium(ctx, k, dev); err != nil {
				return err
			}
			continue
		}
		if !k.Inserted {
			continue
		}
		if err := d.extraMedium(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// driveOption finds the option that made a drive: -drive with its id, or one of
// the short forms, which QEMU names by interface and place ("ide1-cd0").
func (d *describer) driveOption(k *Disk) (located, bool) {
	if k.Device == "" {
		return located{}, false
	}
	if l, ok := d.c.byID(k.Device, "drive"); ok {
		return l, true
	}
	used := make(map[string]int)
	for i, o := range d.c.opts {
		if d.c.gone[i] {
			continue
		}
		var names []string
		switch o.Name {
		case "cdrom":
			names = []string{"ide1-cd0", "ide2-cd0"}
		case "hda", "hdb", "hdc", "hdd":
			n := int(o.Name[2] - 'a')
			names = []string{fmt.Sprintf("ide%d-hd%d", n/2, n%2), fmt.Sprintf("ide%d-hd0", n)}
		case "fda", "fdb":
			names = []string{"floppy" + strconv.Itoa(int(o.Name[2]-'a'))}
		case "pflash":
			names = []string{"pflash" + strconv.Itoa(used["pflash"])}
			used["pflash"]++
		case "drive":
			kv, err := o.KeyVal()
			if err != nil {
				continue
			}
			if _, ok := kv.Get("id"); ok {
				continue
			}
			if d.driveName(kv, used) == k.Device {
				return located{i, o, kv}, true
			}
			continue
		}
		for _, n := range names {
			if n == k.Device {
				return located{index: i, opt: o}, true
			}
		}
	}
	return located{}, false
}

// driveName is the name QEMU gives a -drive without id: interface, bus, medium
// and unit. Buses hold two units on IDE of a pc, one on q35's AHCI, seven on
// SCSI; interfaces without buses count on.
func (d *describer) driveName(kv *cmdline.KeyVal, used map[string]int) string {
	iface, ok := kv.Get("if")
	if !ok {
		iface = "ide"
	}
	if iface == "none" {
		return ""
	}
	number := func(key string) (int, bool) {
		v, ok := kv.Get(key)
		n, err := strconv.Atoi(v)
		return n, ok && err == nil && n >= 0
	}
	perBus := map[string]int{"ide": 2, "scsi": 7}[iface]
	if iface == "ide" && strings.Contains(d.t.Machine, "q35") {
		perBus = 1
	}
	bus, hasBus := number("bus")
	unit, hasUnit := number("unit")
	if index, ok := number("index"); ok {
		bus, unit = 0, index
		if perBus > 0 {
			bus, unit = index/perBus, index%perBus
		}
	} else if !hasBus && !hasUnit {
		n := used[iface]
		unit = n
		if perBus > 0 {
			bus, unit = n/perBus, n%perBus
		}
	}
	place := bus*max(perBus, 1) + unit
	used[iface] = max(used[iface], place+1)
	medium := ""
	if iface == "ide" || iface == "scsi" {
		medium = "-hd"
		if m, _ := kv.Get("media"); m == "cdrom" {
			medium = "-cd"
		}
	}
	if perBus > 0 {
		return fmt.Sprintf("%s%d%s%d", iface, bus, medium, unit)
	}
	return fmt.Sprintf("%s%s%d", iface, medium, unit)
}

// driveMedium brings a drive's option up to date.
func (d *describer) driveMedium(k *Disk, l located) {
	recorded := l.opt.Value
	if l.kv != nil {
		recorded, _ = l.kv.Get("file")
	}
	live := ""
	if k.Inserted {
		live = k.File
	}
	if d.samePath(recorded, live) {
		return
	}
	if !plainFile(live) {
		d.c.refuse("changed-medium", k.Name, "it now holds "+live+", which is not a plain file", "insert an image file, or eject it")
		return
	}
	reason := fmt.Sprintf("drive %s: the medium is now %s", k.Name, live)
	if live == "" {
		reason = fmt.Sprintf("drive %s: the medium was ejected", k.Name)
	}
	if !d.c.editable(l, k.Name, "its medium was changed") {
		return
	}
	if l.kv == nil { // -cdrom FILE means -drive index=2,media=cdrom,file=FILE
		index := map[string]string{"cdrom": "2", "hda": "0", "hdb": "1", "hdc": "2", "hdd": "3"}[l.opt.Name]
		if live != "" {
			l.opt.Value = live
			d.c.replace(l.index, l.opt, reason)
			return
		}
		if index == "" {
			d.c.remove(l.index, reason)
			return
		}
		value := "if=ide,index=" + index + ",media=" + map[bool]string{true: "cdrom", false: "disk"}[l.opt.Name == "cdrom"]
		d.c.replace(l.index, cmdline.Option{Name: "drive", Value: value, HasValue: true}, reason)
		return
	}
	if live == "" {
		l.kv.Delete("file")
		l.kv.Delete("format")
	} else {
		l.kv.Set("file", live)
		l.kv.Set("format", k.Driver)
	}
	d.c.set(l.index, l.kv, reason)
}

// plainFile reports whether QEMU's name of an image is a path.
func plainFile(name string) bool {
	return name == "" || !strings.HasPrefix(name, "json:") && (strings.HasPrefix(name, "/") || !strings.Contains(name, ":"))
}

// samePath compares two names of an image as QEMU resolves them.
func (d *describer) samePath(a, b string) bool {
	abs := func(s string) string {
		s = strings.TrimPrefix(s, "file:")
		if s != "" && plainFile(s) && !filepath.IsAbs(s) {
			s = filepath.Join(d.t.Process.Cwd, s)
		}
		return s
	}
	// A redacted address cannot be compared, and was not changed by us.
	return abs(a) == abs(b) || strings.Contains(a, "@ckagent:secret:") && b != ""
}

// deviceOption finds the -device a drive's frontend was made by.
func (d *describer) deviceOption(k *Disk) (located, bool) {
	id, ok := strings.CutPrefix(k.QOMPath, "/machine/peripheral/")
	if !ok {
		return located{}, false
	}
	id, _, _ = strings.Cut(id, "/")
	return d.c.byID(id, "device")
}

// nodeMedium compares a device's drive= with the node it has now.
func (d *describer) nodeMedium(ctx context.Context, k *Disk, dev located) error {
	recorded, _ := dev.kv.Get("drive")
	if recorded == k.Node && (k.Node == "" || d.hasNode(k.Node)) || recorded != "" && recorded == k.Device {
		return nil
	}
	if !d.c.editable(dev, k.Name, "its medium was changed") {
		return nil
	}
	if !k.Inserted {
		dev.kv.Delete("drive")
		d.c.set(dev.index, dev.kv, "device "+k.Name+": the medium was ejected")
		return nil
	}
	node, err := d.blockdev(ctx, k)
	if err != nil || node == "" {
		return err
	}
	dev.kv.Set("drive", node)
	d.c.set(dev.index, dev.kv, "device "+k.Name+": the medium is now "+k.File)
	return nil
}

// hasNode reports whether the command line makes this block node.
func (d *describer) hasNode(node string) bool {
	for _, l := range d.c.named("blockdev") {
		if n, _ := l.kv.Get("node-name"); n == node {
			return true
		}
	}
	return false
}

// extraMedium records a medium that no option speaks of: in a drive the machine
// makes by itself, or an image added at run time.
func (d *describer) extraMedium(ctx context.Context, k *Disk) error {
	anon := strings.HasPrefix(k.QOMPath, "/machine/peripheral-anon/")
	switch {
	case anon && (k.Node != "" && d.hasNode(k.Node) || k.Device != "" && d.namesDrive(k.Device)):
		return nil // -device without an id, its medium as given
	case strings.HasPrefix(k.QOMPath, "/machine/unattached/") && k.Removable && strings.HasPrefix(k.Type, "ide-cd") && plainFile(k.File):
		d.c.add(cmdline.Option{Name: "cdrom", Value: k.File, HasValue: true}, "drive "+k.Name+": "+k.File+" was inserted")
		return nil
	case k.Pflash && d.hasNode(k.Node):
		return nil // -machine pflash0=NODE
	case anon || k.QOMPath == "":
		if k.QOMPath == "" && (k.Device == "" || d.hasNode(k.Node)) {
			return nil // an image nothing uses
		}
	}
	if !strings.HasPrefix(k.QOMPath, "/machine/peripheral/") {
		d.c.refuse("changed-medium", k.Name, "nothing on the command line accounts for "+k.File+" in it", "eject it, or start the VM with it")
		return nil
	}
	// A plugged-in device: its argument names the backend by Device or Node.
	if k.Device != "" {
		if !plainFile(k.File) {
			d.c.refuse("changed-medium", k.Name, "it holds "+k.File+", which is not a plain file", "use an image file")
			return nil
		}
		kv, err := cmdline.ParseKeyVal("if=none", "")
		if err != nil {
			return err
		}
		if k.ReadOnly {
			kv.Set("readonly", "on")
		}
		kv.Set("id", k.Device)
		kv.Set("format", k.Driver)
		kv.Set("file", k.File)
		d.c.add(cmdline.Option{Name: "drive", Value: kv.String(), HasValue: true}, "drive "+k.Device+" was added")
		return nil
	}
	_, err := d.blockdev(ctx, k)
	return err
}

// namesDrive reports whether a -drive option has this id.
func (d *describer) namesDrive(id string) bool {
	_, ok := d.c.byID(id, "drive")
	return ok
}

// blockdev makes sure that the command line makes the node of a medium and
// returns its name, or refuses and returns "".
func (d *describer) blockdev(ctx context.Context, k *Disk) (string, error) {
	if d.hasNode(k.Node) {
		return k.Node, nil
	}
	var nodes []struct {
		Node string `json:"node-name"`
		Drv  string `json:"drv"`
		File string `json:"file"`
	}
	if err := d.t.QMP.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return "", fmt.Errorf("query-named-block-nodes: %w", err)
	}
	protocol := ""
	for _, n := range nodes {
		if n.File == k.File && n.Node != k.Node && (n.Drv == "file" || n.Drv == "host_device" || n.Drv == "host_cdrom") {
			protocol = n.Drv
		}
	}
	if protocol == "" || !plainFile(k.File) || k.Driver != "raw" && k.Driver != "qcow2" {
		d.c.refuse("changed-medium", k.Name, fmt.Sprintf("the image attached at run time (%s, %s) cannot be described", k.Driver, k.File),
			"use a raw or qcow2 file")
		return "", nil
	}
	name := k.Node
	if strings.HasPrefix(name, "#") { // QEMU's own names cannot be given
		d.made++
		name = "ckagent-medium-" + strconv.Itoa(d.made)
	}
	text, err := json.Marshal(map[string]any{"driver": k.Driver, "node-name": name, "read-only": k.ReadOnly,
		"file": map[string]any{"driver": protocol, "filename": k.File, "read-only": k.ReadOnly}})
	if err != nil {
		return "", err
	}
	d.c.add(cmdline.Option{Name: "blockdev", Value: string(text), HasValue: true}, "image "+k.File+" was attached")
	return name, nil
}
