package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// rebuildable are the device types whose -device argument can be made from their
// properties such that the same device comes out.
var rebuildable = map[string]bool{
	"pc-dimm": true, "virtio-net-pci": true, "virtio-rng-pci": true, "virtio-balloon-pci": true,
	"virtio-serial-pci": true, "virtserialport": true, "virtconsole": true, "virtio-scsi-pci": true,
	"virtio-blk-pci": true, "virtio-keyboard-pci": true, "virtio-mouse-pci": true, "virtio-tablet-pci": true,
	"scsi-cd": true, "scsi-hd": true, "usb-tablet": true, "usb-kbd": true, "usb-mouse": true,
	"pcie-root-port": true, "e1000": true, "e1000e": true, "rtl8139": true, "i6300esb": true,
}

// plainProperties have no default value in QEMU's listing but belong to the
// argument when set.
var plainProperties = map[string]bool{
	"netdev": true, "mac": true, "drive": true, "chardev": true, "memdev": true, "rng": true, "iothread": true,
	"serial": true, "ver": true, "name": true, "vendor": true, "product": true, "romfile": true, "failover_pair_id": true,
}

// bootROM are devices that bring a ROM of their own unless they are told not to, by
// an empty name.
var bootROM = map[string]bool{"virtio-net-pci": true, "e1000": true, "e1000e": true, "rtl8139": true}

// skippedProperties are never arguments: the device sets them itself.
var skippedProperties = map[string]bool{
	"type": true, "realized": true, "hotplugged": true, "hotpluggable": true, "parent_bus": true, "addr": true, "busnr": true,
}

var cpuType = regexp.MustCompile(`-(x86_64|i386)-cpu$`)

// devices compares -device with what is plugged in.
func (d *describer) devices(ctx context.Context) error {
	live := make(map[string]bool)
	hot := make(map[string]string) // id -> type, for devices to append
	children, err := qomList(ctx, d.t.QMP, "/machine/peripheral")
	if err != nil {
		return fmt.Errorf("qom-list: %w", err)
	}
	for _, ch := range children {
		typ, ok := ch.object()
		if !ok {
			continue
		}
		live[ch.Name] = true
		plugged, err := qomGet[bool](ctx, d.t.QMP, "/machine/peripheral/"+ch.Name, "hotplugged")
		if err != nil {
			return fmt.Errorf("%s: %w", ch.Name, err)
		}
		if plugged {
			hot[ch.Name] = typ
		}
	}
	for _, l := range d.c.named("device") {
		id, ok := l.kv.Get("id")
		if !ok {
			continue
		}
		switch _, again := hot[id]; {
		case !live[id]:
			if d.c.editable(l, id, "it was unplugged") {
				d.c.remove(l.index, "device "+id+" was unplugged")
			}
		case again:
			if d.c.editable(l, id, "it was unplugged and another plugged in by its name") {
				d.c.remove(l.index, "device "+id+" was unplugged and plugged in anew")
			}
		}
	}
	// A device on a bus that another hot-plugged device provides comes after it.
	for len(hot) > 0 {
		var ready []string
		parents := make(map[string]string)
		for id := range hot {
			bus, err := qomGet[string](ctx, d.t.QMP, "/machine/peripheral/"+id, "parent_bus")
			if err != nil {
				return fmt.Errorf("bus of %s: %w", id, err)
			}
			parents[id] = bus
			owner, _, _ := strings.Cut(strings.TrimPrefix(bus, "/machine/peripheral/"), "/")
			if _, waits := hot[owner]; !waits || owner == id {
				ready = append(ready, id)
			}
		}
		if len(ready) == 0 {
			return fmt.Errorf("devices plugged into each other: %v", hot)
		}
		slices.Sort(ready)
		for _, id := range ready {
			if err := d.device(ctx, "/machine/peripheral/"+id, id, hot[id], parents[id]); err != nil {
				return err
			}
			delete(hot, id)
		}
	}
	return d.anonymousDevices(ctx)
}

// anonymousDevices looks at devices without an id. QEMU numbers them as they
// come, so a gap tells that one was taken out, though not which argument it was.
func (d *describer) anonymousDevices(ctx context.Context) error {
	children, err := qomList(ctx, d.t.QMP, "/machine/peripheral-anon")
	if err != nil {
		return fmt.Errorf("qom-list: %w", err)
	}
	types := make(map[int]string)
	for _, ch := range children {
		typ, ok := ch.object()
		if !ok {
			continue
		}
		num, ok := strings.CutPrefix(strings.TrimSuffix(ch.Name, "]"), "device[")
		n, err := strconv.Atoi(num)
		if !ok || err != nil || n < 0 || n > 1<<16 {
			return fmt.Errorf("%w: device %q", errHMP, ch.Name)
		}
		types[n] = typ
	}
	for n := range len(types) {
		typ, ok := types[n]
		if !ok {
			d.c.refuse("unplugged-device", fmt.Sprintf("device[%d]", n), "a device without an id was unplugged, and nothing tells which argument it was",
				"give devices an id")
			return nil
		}
		path := fmt.Sprintf("/machine/peripheral-anon/device[%d]", n)
		hot, err := qomGet[bool](ctx, d.t.QMP, path, "hotplugged")
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if !hot {
			continue
		}
		bus, err := qomGet[string](ctx, d.t.QMP, path, "parent_bus")
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := d.device(ctx, path, "", typ, bus); err != nil {
			return err
		}
	}
	return nil
}

type deviceProperty struct {
	Name    string          `json:"name"`
	Type    string          `json:"type"`
	Default json.RawMessage `json:"default-value"`
}

// device appends the -device argument for a device that was plugged in.
func (d *describer) device(ctx context.Context, path, id, typ, bus string) error {
	isCPU := cpuType.MatchString(typ)
	if !rebuildable[typ] && !isCPU {
		d.c.refuse("plugged-device", strings.TrimSpace(id+" ("+typ+")"), "it was plugged in at run time, and its argument cannot be made from what QEMU tells of it",
			"unplug it, or start the VM with it on the command line")
		return nil
	}
	arg := map[string]any{"driver": typ}
	if id != "" {
		arg["id"] = id
	}
	if bus != "" && !isCPU {
		arg["bus"] = lastWord(bus)
	}
	var props []deviceProperty
	if err := d.t.QMP.Execute(ctx, "device-list-properties", map[string]string{"typename": typ}, &props); err != nil {
		return fmt.Errorf("properties of %s: %w", typ, err)
	}
	for _, p := range props {
		if isCPU && !slices.Contains([]string{"socket-id", "die-id", "core-id", "thread-id", "module-id", "node-id"}, p.Name) {
			continue // the model is given by -cpu for all of them
		}
		if p.Name == "addr" && strings.Contains(typ, "dimm") {
			p.Name = "addr" // of a DIMM: a number like any other
		} else if skippedProperties[p.Name] || strings.HasPrefix(p.Name, "x-") || strings.HasPrefix(p.Name, "legacy-") {
			continue
		}
		if p.Default == nil && !plainProperties[p.Name] {
			continue
		}
		v, err := qomGet[json.RawMessage](ctx, d.t.QMP, path, p.Name)
		if err != nil {
			continue // write-only, which no argument needs
		}
		if p.Default != nil && sameJSON(v, p.Default) || p.Default == nil && bytes.Equal(v, []byte(`""`)) && !(p.Name == "romfile" && bootROM[typ]) {
			continue
		}
		// A link to an object of the device's own, as the backend that virtio-rng
		// makes itself when none is given: it comes with the device again.
		var link string
		if json.Unmarshal(v, &link) == nil && strings.HasPrefix(link, path+"/") {
			continue
		}
		arg[p.Name] = v
	}
	// PCI: the slot is what keeps the guest's view; "legacy-addr" reads 03.0.
	if !isCPU && !strings.Contains(typ, "dimm") {
		if addr, err := qomGet[string](ctx, d.t.QMP, path, "legacy-addr"); err == nil {
			arg["addr"] = addr
		} else if v, err := qomGet[json.RawMessage](ctx, d.t.QMP, path, "addr"); err == nil {
			if n, err := strconv.Atoi(string(v)); err == nil && n >= 0 {
				arg["addr"] = fmt.Sprintf("%02x.%x", n>>3, n&7)
			} else if err != nil {
				arg["addr"] = v
			}
		}
	}
	text, err := json.Marshal(arg)
	if err != nil {
		return err
	}
	if id == "" {
		id = "without an id"
	}
	d.c.add(cmdline.Option{Name: "device", Value: string(text), HasValue: true}, "device "+id+" ("+typ+") was plugged in")
	return nil
}

func sameJSON(a, b json.RawMessage) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && fmt.Sprint(x) == fmt.Sprint(y)
}

// objectProperties are the properties that make an -object again, by type.
var objectProperties = map[string][]string{
	"memory-backend-ram":   {"size", "share", "prealloc", "merge", "dump", "policy", "host-nodes", "reserve"},
	"memory-backend-memfd": {"size", "share", "prealloc", "merge", "dump", "policy", "host-nodes", "reserve", "hugetlb", "hugetlbsize", "seal"},
	"memory-backend-file":  {"size", "share", "prealloc", "merge", "dump", "policy", "host-nodes", "reserve", "mem-path", "align", "discard-data", "readonly", "offset"},
	"rng-random":           {"filename"},
	"rng-builtin":          {},
	"iothread":             {"poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"},
	"secret":               {"format"},
}

// objects compares -object with the objects there are.
func (d *describer) objects(ctx context.Context) error {
	children, err := qomList(ctx, d.t.QMP, "/objects")
	if err != nil {
		return fmt.Errorf("qom-list: %w", err)
	}
	live := make(map[string]string)
	for _, ch := range children {
		if typ, ok := ch.object(); ok {
			live[ch.Name] = typ
		}
	}
	known := make(map[string]bool)
	for _, l := range d.c.named("object") {
		id, _ := l.kv.Get("id")
		known[id] = true
		if _, ok := live[id]; !ok && d.c.editable(l, id, "it was deleted") {
			d.c.remove(l.index, "object "+id+" was deleted")
		}
	}
	var ids []string
	for id := range live {
		// The machine makes its own backend for RAM given by -m.
		if !known[id] && id != d.defaultRAM {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		if err := d.object(ctx, id, live[id]); err != nil {
			return err
		}
	}
	return nil
}

func (d *describer) object(ctx context.Context, id, typ string) error {
	names, ok := objectProperties[typ]
	if !ok {
		d.c.refuse("added-object", id+" ("+typ+")", "it was added at run time, and its argument cannot be made from what QEMU tells of it",
			"delete it, or start the VM with it on the command line")
		return nil
	}
	arg := map[string]any{"qom-type": typ, "id": id}
	for _, name := range names {
		v, err := qomGet[json.RawMessage](ctx, d.t.QMP, "/objects/"+id, name)
		if err != nil {
			continue // not in this release
		}
		if s := string(v); s == "[]" || s == `""` || s == "null" || name == "align" && s == "0" || name == "offset" && s == "0" ||
			name == "hugetlbsize" && s == "0" {
			continue
		}
		arg[name] = v
	}
	if typ == "secret" {
		arg["data"] = d.redact.take("object", id, "data", "the data of secret "+id)
	}
	text, err := json.Marshal(arg)
	if err != nil {
		return err
	}
	d.c.add(cmdline.Option{Name: "object", Value: string(text), HasValue: true}, "object "+id+" ("+typ+") was added")
	return nil
}
