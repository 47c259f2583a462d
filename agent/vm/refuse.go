package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// Refusal is one reason why a VM cannot be protected. Codes are stable; scripts
// may branch on them.
type Refusal struct {
	Code   string `json:"code"`
	Object string `json:"object"` // a device, drive, block or process by name
	Reason string `json:"reason"`
	Advice string `json:"advice"`
}

func (r Refusal) String() string { return r.Object + ": " + r.Reason }

// Refused makes one error of a list of refusals: nil when there are none.
func (t *Target) Refused(op string, list []Refusal) error {
	if len(list) == 0 {
		return nil
	}
	var reasons, advice []string
	for _, r := range list {
		reasons = append(reasons, r.String())
		if r.Advice != "" && !slices.Contains(advice, r.Advice) {
			advice = append(advice, r.Advice)
		}
	}
	return problem.New(problem.Refused, op, t.Process.String(), "%s", strings.Join(reasons, "; ")).
		WithHint("%s", strings.Join(advice, "; "))
}

// Refusals lists everything that forbids a checkpoint of this VM, most telling
// first. It reads and asks, and changes nothing. The layout is resolved if Layout
// was not called yet; a layout that cannot be resolved is itself a refusal. What
// forbids rebuilding the machine is found by Describe.
func (t *Target) Refusals(ctx context.Context) ([]Refusal, error) {
	var out []Refusal
	for _, check := range []func(context.Context) ([]Refusal, error){
		t.refuseState, t.refuseMigration, t.refuseAccel, t.refuseDevices, t.refuseDisks,
		t.refuseTracer, t.refuseLayout, t.refuseConfidential,
	} {
		r, err := check(ctx)
		if err != nil {
			if gone := t.Process.Check(); gone != nil {
				return nil, gone
			}
			return nil, problem.New(problem.CodeOf(err), "check", t.Process.String(), "%w", err)
		}
		out = append(out, r...)
	}
	return out, nil
}

func (t *Target) refuseState(ctx context.Context) ([]Refusal, error) {
	s, err := t.Status(ctx)
	if err != nil || checkpointable[s.State] {
		return nil, err
	}
	why, ok := stateAdvice[s.State]
	if !ok {
		why = [2]string{"this state is not known", "let the machine run"}
	}
	return []Refusal{{Code: "run-state", Object: s.State, Reason: why[0], Advice: why[1]}}, nil
}

func (t *Target) refuseMigration(ctx context.Context) ([]Refusal, error) {
	var info struct {
		Status  string   `json:"status"`
		Blocked []string `json:"blocked-reasons"`
	}
	if err := t.QMP.Execute(ctx, "query-migrate", nil, &info); err != nil {
		return nil, fmt.Errorf("query-migrate: %w", err)
	}
	var out []Refusal
	for _, b := range info.Blocked {
		out = append(out, Refusal{Code: "migration-blocker", Object: "device state", Reason: "QEMU cannot save it: " + b,
			Advice: "remove the device or feature named, or replace it by one that can be migrated"})
	}
	if !migrationIdle[info.Status] {
		out = append(out, Refusal{Code: "migration-active", Object: "migration", Reason: "one is under way (" + info.Status + ")",
			Advice: "wait for it to end or cancel it"})
	}
	var jobs []struct {
		ID     string `json:"id"`
		Type   string `json:"type"`
		Status string `json:"status"`
	}
	if err := t.QMP.Execute(ctx, "query-jobs", nil, &jobs); err != nil && !qmp.IsCommandNotFound(err) {
		return nil, fmt.Errorf("query-jobs: %w", err)
	}
	for _, j := range jobs {
		if j.Status != "concluded" && j.Status != "null" && !disk.Ours(j.ID) {
			out = append(out, Refusal{Code: "job-active", Object: j.ID, Reason: "a " + j.Type + " job is under way",
				Advice: "wait for it to end or cancel it"})
		}
	}
	return out, nil
}

func (t *Target) refuseAccel(context.Context) ([]Refusal, error) {
	if t.Accel == "kvm" || t.Accel == "tcg" {
		return nil, nil
	}
	return []Refusal{{Code: "accelerator", Object: t.Accel, Reason: "only kvm and tcg are supported", Advice: "run the VM under kvm or tcg"}}, nil
}

// deviceRules refuse devices by type. What QEMU itself cannot migrate is in
// query-migrate; these are the ones it would let pass while memory or state lies
// outside of what a checkpoint holds.
var deviceRules = []struct {
	match        func(typ string) bool
	code         string
	why, instead string
}{
	{hasPrefix("vfio-"), "vfio", "the device reads and writes guest memory by DMA, which no write protection sees", "use an emulated or virtio device"},
	{hasPrefix("vhost-user-"), "vhost-user", "another process serves it and writes guest memory on its own", "use the device's in-QEMU variant"},
	{hasPrefix("vhost-vdpa"), "vhost-vdpa", "hardware writes guest memory by DMA", "use virtio-net or virtio-blk in QEMU"},
	{hasPrefix("vhost-scsi"), "vhost", "the kernel serves it from its own disks", "use virtio-scsi"},
	{hasPrefix("nvdimm", "virtio-pmem"), "persistent-memory", "guest writes go straight to a host file, which is a writable disk", "use a read-only image, or ordinary memory"},
	{hasPrefix("virtio-mem"), "virtio-mem", "restoring a partly plugged virtio-mem is not proven", "use DIMMs (pc-dimm) or a fixed size"},
	{hasPrefix("sgx-epc"), "confidential", "enclave memory cannot be read", "run the VM without SGX"},
	{hasPrefix("ivshmem-doorbell"), "shared-memory", "its memory belongs to a group of VMs", "checkpoint a VM without it"},
	{hasPrefix("usb-host"), "host-device", "a physical USB device keeps state of its own", "unplug it"},
	{hasPrefix("tpm-"), "tpm", "the TPM's state lies in a process or a chip outside of QEMU", "run the VM without a TPM"},
}

func hasPrefix(prefixes ...string) func(string) bool {
	return func(s string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
	}
}

// vhostFiles are device files whose holder lets somebody else write guest memory.
var vhostFiles = map[string]Refusal{
	"/dev/vhost-net": {Code: "vhost-net",
		Reason: "a kernel thread writes received packets into guest memory; that its faults are served rightly is not proven on this host",
		Advice: "start the network backend with vhost=off"},
	"/dev/vhost-vsock": {Code: "vhost", Reason: "a kernel thread writes guest memory; that its faults are served rightly is not proven on this host",
		Advice: "remove the vsock device"},
	"/dev/vhost-scsi": {Code: "vhost", Reason: "the kernel serves its disks on its own", Advice: "use virtio-scsi"},
}

func (t *Target) refuseDevices(ctx context.Context) ([]Refusal, error) {
	var out []Refusal
	for _, dir := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		children, err := qomList(ctx, t.QMP, dir)
		if err != nil {
			return nil, fmt.Errorf("qom-list %s: %w", dir, err)
		}
		for _, c := range children {
			typ, ok := c.object()
			if !ok {
				continue
			}
			for _, r := range deviceRules {
				if r.match(typ) {
					out = append(out, Refusal{Code: r.code, Object: c.Name + " (" + typ + ")", Reason: r.why, Advice: r.instead})
				}
			}
		}
	}
	fds, err := t.Process.FDs()
	if err != nil {
		return nil, fmt.Errorf("descriptors: %w", err)
	}
	seen := make(map[string]bool)
	for _, fd := range fds {
		name := fd.Target
		if seen[name] {
			continue
		}
		seen[name] = true
		r, ok := vhostFiles[name]
		switch {
		case ok:
		case strings.HasPrefix(name, "/dev/vhost-vdpa"):
			r = Refusal{Code: "vhost-vdpa", Reason: "hardware writes guest memory by DMA", Advice: "use virtio devices in QEMU"}
		case strings.HasPrefix(name, "/dev/vfio/"), strings.HasPrefix(name, "anon_inode:[vfio"), name == "/dev/iommu":
			r = Refusal{Code: "vfio", Reason: "hardware writes guest memory by DMA, which no write protection sees", Advice: "use an emulated or virtio device"}
		default:
			continue
		}
		r.Object = name
		// The device was already refused by its type: one reason is enough.
		if !slices.ContainsFunc(out, func(o Refusal) bool { return o.Code == r.Code }) {
			out = append(out, r)
		}
	}
	return out, nil
}

func (t *Target) refuseDisks(ctx context.Context) ([]Refusal, error) {
	if t.LeaveDisksOut {
		return nil, nil
	}
	_, refused, err := t.DiskSources(ctx)
	return refused, err
}

func (t *Target) refuseTracer(context.Context) ([]Refusal, error) {
	tracer, err := t.Process.Tracer()
	if err != nil || tracer == 0 {
		return nil, err
	}
	name := object(tracer)
	if comm, err := readBounded("/proc/"+strconv.Itoa(tracer)+"/comm", 64); err == nil {
		name += " (" + strings.TrimSpace(string(comm)) + ")"
	}
	return []Refusal{{Code: "traced", Object: name, Reason: "it traces QEMU, and a process has one tracer at a time", Advice: "end the debugger or strace"}}, nil
}

// refuseConfidential finds guests whose memory only they can read.
func (t *Target) refuseConfidential(ctx context.Context) ([]Refusal, error) {
	link, err := qomGet[string](ctx, t.QMP, "/machine", "confidential-guest-support")
	if err != nil {
		if _, ok := errors.AsType[*qmp.Error](err); ok {
			return nil, nil // machines without the property have no such guests
		}
		return nil, err
	}
	if link == "" {
		return nil, nil
	}
	typ, err := qomGet[string](ctx, t.QMP, link, "type")
	if err != nil {
		return nil, err
	}
	return []Refusal{{Code: "confidential", Object: typ, Reason: "the guest's memory is encrypted and can only be read by the guest",
		Advice: "run the VM without memory encryption"}}, nil
}

// RefusedUserfaultfd is the code of a refusal because of a userfaultfd on a RAMBlock.
const RefusedUserfaultfd = "userfaultfd"

// uffdFlags are VmFlags codes of a mapping registered with a userfaultfd.
var uffdFlags = []string{"um", "uw", "ui"}

func (t *Target) refuseLayout(ctx context.Context) ([]Refusal, error) {
	if t.Blocks == nil {
		if _, err := t.Layout(ctx); err != nil {
			e, ok := errors.AsType[*problem.Error](err)
			if ok && e.Code == problem.Refused {
				return []Refusal{{Code: "layout", Object: "guest memory", Reason: e.Err.Error(), Advice: e.Hint}}, nil
			}
			return nil, err
		}
	}
	now := func(b *RAMBlock) []VMA { return b.VMAs }
	if !t.fresh {
		vmas, err := t.Process.ReadSmaps()
		if err != nil {
			return nil, err
		}
		now = func(b *RAMBlock) []VMA { return vmasAt(vmas, b.HVA, b.mapBytes()) }
	}
	t.fresh = false
	var out []Refusal
	var filed []*RAMBlock
	for i := range t.Blocks {
		b := &t.Blocks[i]
		out = append(out, refuseBlock(b, now(b))...)
		if b.VMAs[0].Inode != 0 {
			filed = append(filed, b)
		}
	}
	others, err := mappedElsewhere(t.Process, filed)
	if err != nil {
		return nil, err
	}
	return append(out, others...), nil
}

func (b *RAMBlock) mapBytes() uint64 { return (b.TotalBytes + b.PageBytes - 1) &^ (b.PageBytes - 1) }

// hugePage is the size of the pages of hugetlbfs that a checkpoint can hold, in bytes.
const hugePage = 2 << 20

// refuseBlock judges one block by its mappings as they are now.
func refuseBlock(b *RAMBlock, vmas []VMA) []Refusal {
	var out []Refusal
	if vmas == nil {
		return []Refusal{{Code: "layout", Object: b.Name, Reason: "its mapping has changed since it was found", Advice: "try again"}}
	}
	switch {
	case b.Backing == Hugetlb && b.PageBytes != hugePage:
		out = append(out, Refusal{Code: "hugetlbfs", Object: b.Name,
			Reason: fmt.Sprintf("it lies in huge pages of %d MiB from hugetlbfs, and a guest that writes to one would wait until all of it is copied", b.PageBytes>>20),
			Advice: "use huge pages of 2 MiB (pagesize=2M, hugetlbsize=2M), or transparent ones"})
	case b.Backing == Device:
		out = append(out, Refusal{Code: "device-memory", Object: b.Name, Reason: "it is a mapping of the device " + b.FilePath,
			Advice: "use ordinary memory"})
	}
	for i := range vmas {
		j := slices.IndexFunc(uffdFlags, vmas[i].Is)
		if j < 0 {
			continue
		}
		out = append(out, Refusal{Code: RefusedUserfaultfd, Object: b.Name,
			Reason: "a userfaultfd is registered on it already (" + uffdFlags[j] + "): post-copy, a background snapshot, a restore that still pages in, or another ckagent",
			Advice: "wait for it to end; `ckagent release` lets go of what a dead ckagent left"})
		break
	}
	return out
}

// mappedElsewhere finds processes that map the files behind blocks: they write
// guest memory unseen.
func mappedElsewhere(p *Process, blocks []*RAMBlock) ([]Refusal, error) {
	if len(blocks) == 0 {
		return nil, nil
	}
	type file struct {
		major, minor uint32
		inode        uint64
	}
	byFile := make(map[file]*RAMBlock, len(blocks))
	for _, b := range blocks {
		v := &b.VMAs[0]
		byFile[file{v.Major, v.Minor, v.Inode}] = b
	}
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []Refusal
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil || pid == p.PID {
			continue
		}
		f, err := os.Open("/proc/" + n + "/maps")
		if err != nil {
			// Root is denied only where a process has rights beyond ours, such as
			// the host's init seen from a container: no peer of a VM. Without root
			// nearly every process is hidden, and nothing would be proven.
			if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
				return nil, problem.New(problem.Refused, "look for other users of guest memory", object(pid), "%w", err).WithHint("run as root")
			}
			continue // ended meanwhile
		}
		vmas, err := parseMaps(f)
		f.Close()
		if err != nil {
			continue // ended while it was read
		}
		told := make(map[*RAMBlock]bool)
		for i := range vmas {
			v := &vmas[i]
			b := byFile[file{v.Major, v.Minor, v.Inode}]
			// A private mapping of theirs writes nothing of ours. Of a block that
			// is private to QEMU the file is only a template, which many VMs may
			// share as long as nobody writes it.
			if b == nil || told[b] || !v.Shared() || !b.Shared && !v.Writable() {
				continue
			}
			told[b] = true
			comm, _ := readBounded("/proc/"+n+"/comm", 64)
			out = append(out, Refusal{Code: "shared-memory", Object: b.Name,
				Reason: fmt.Sprintf("process %d (%s) maps it too and can write it unseen", pid, strings.TrimSpace(string(comm))),
				Advice: "end that process or give the VM memory of its own (share=off)"})
		}
	}
	return out, nil
}
