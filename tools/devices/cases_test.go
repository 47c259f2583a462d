package devices

import (
	"os"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// device is something a VM may have, and how to give it to one.
type device struct {
	name  string
	shown string // in the table; the arguments if empty
	cfg   vmtest.Config
	// with makes what lies outside of QEMU and returns more arguments; a reason says
	// that this host has not got it.
	with func(t *testing.T, h *host) (args []string, missing string)
	// plug changes the running machine.
	plug func(t *testing.T, m *vmtest.Monitor)
	// limit is what the test cannot see but a user has to know.
	limit string
}

func args(a ...string) vmtest.Config { return vmtest.Config{Args: a} }

// devices are the rows, in the table's order.
func devices() []device {
	raw := func(more ...string) func(t *testing.T, h *host) ([]string, string) {
		return func(t *testing.T, h *host) ([]string, string) {
			return append([]string{"-drive", "if=none,id=d0,format=raw,file=" + h.disk(t)}, more...), ""
		}
	}
	return []device{
		{name: "virtio-net, user network", shown: "virtio-net-pci", cfg: args("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=")},
		{name: "virtio-net, tap", shown: "-netdev tap", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-netdev", "tap,id=n0,ifname=ckd0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile="}, h.namespace(t)
		}},
		{name: "virtio-net, several queues", shown: "-netdev tap,queues=2", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-netdev", "tap,id=n0,ifname=ckd0,script=no,downscript=no,queues=2", "-device", "virtio-net-pci,netdev=n0,mq=on,vectors=6,romfile="}, h.namespace(t, "multi_queue")
		}},
		{name: "vhost-net", shown: "-netdev tap,vhost=on", with: func(t *testing.T, h *host) ([]string, string) {
			if _, err := os.Stat("/dev/vhost-net"); err != nil {
				return nil, "no /dev/vhost-net"
			}
			return []string{"-netdev", "tap,id=n0,ifname=ckd0,script=no,downscript=no,vhost=on,vhostforce=on", "-device", "virtio-net-pci,netdev=n0,romfile="}, h.namespace(t)
		}, limit: "A QEMU that has it open is refused (`vhost-net`); use vhost=off"},
		{name: "e1000", shown: "e1000", cfg: args("-netdev", "user,id=n0", "-device", "e1000,netdev=n0,romfile=")},
		{name: "NIC, hot-plugged", shown: "device_add virtio-net-pci", cfg: args("-netdev", "user,id=n0"),
			plug: func(t *testing.T, m *vmtest.Monitor) {
				do(t, m, "device_add", map[string]any{"driver": "virtio-net-pci", "id": "late0", "netdev": "n0", "romfile": ""})
			}},
		{name: "virtio-blk, raw file", shown: "virtio-blk-pci", with: raw("-device", "virtio-blk-pci,drive=d0")},
		{name: "virtio-blk, several queues", shown: "virtio-blk-pci,num-queues=2", with: raw("-device", "virtio-blk-pci,drive=d0,num-queues=2")},
		{name: "virtio-blk, qcow2", shown: "format=qcow2", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-drive", "if=none,id=d0,format=qcow2,file=" + h.qcow2(t), "-device", "virtio-blk-pci,drive=d0"}, ""
		}},
		{name: "virtio-scsi", shown: "virtio-scsi-pci, scsi-hd", with: raw("-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,bus=s0.0,drive=d0")},
		{name: "AHCI", shown: "ahci, ide-hd", with: raw("-device", "ahci,id=a0", "-device", "ide-hd,bus=a0.0,drive=d0")},
		{name: "NVMe", shown: "nvme", with: raw("-device", "nvme,serial=x,drive=d0")},
		{name: "disk on a block device", shown: "-drive file=/dev/loopN", with: func(t *testing.T, h *host) ([]string, string) {
			dev, missing := h.loop(t)
			return []string{"-drive", "if=none,id=d0,format=raw,cache=none,file=" + dev, "-device", "virtio-blk-pci,drive=d0"}, missing
		}},
		{name: "disk on network storage", shown: "-blockdev driver=nbd", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-blockdev", "driver=nbd,node-name=d0,server.type=inet,server.host=127.0.0.1,server.port=" + h.nbd(t), "-device", "virtio-blk-pci,drive=d0"}, ""
		}},
		{name: "vhost-user", shown: "vhost-user-blk-pci", cfg: vmtest.Config{Backend: vmtest.Memfd}, with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-chardev", "socket,id=vu0,path=" + h.vhostUser(t), "-device", "vhost-user-blk-pci,chardev=vu0"}, ""
		}},
		{name: "9p", shown: "virtio-9p-pci", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-fsdev", "local,id=f0,security_model=none,path=" + h.dir, "-device", "virtio-9p-pci,fsdev=f0,mount_tag=host"}, ""
		}, limit: "while the guest has not mounted it: QEMU cannot save a mounted one (`migration-blocker`)"},
		{name: "virtio-rng", shown: "virtio-rng-pci", cfg: args("-device", "virtio-rng-pci")},
		{name: "balloon", shown: "virtio-balloon-pci,free-page-reporting=on", cfg: args("-device", "virtio-balloon-pci,free-page-reporting=on"),
			limit: "a page that the guest gives back during a capture costs another attempt (`retaken`)"},
		{name: "free page reporting, RAM in a memfd", shown: "virtio-balloon-pci,free-page-reporting=on", cfg: vmtest.Config{Backend: vmtest.Memfd, Args: []string{"-device", "virtio-balloon-pci,free-page-reporting=on"}}},
		{name: "virtio-gpu", shown: "virtio-gpu-pci", cfg: args("-device", "virtio-gpu-pci")},
		{name: "virtio-serial", shown: "virtio-serial-pci", cfg: args("-device", "virtio-serial-pci", "-chardev", "null,id=c0", "-device", "virtserialport,chardev=c0,name=org.example")},
		{name: "USB tablet", shown: "qemu-xhci, usb-tablet", cfg: args("-device", "qemu-xhci", "-device", "usb-tablet")},
		{name: "UEFI variables (pflash)", shown: "-drive if=pflash", cfg: vmtest.Config{Machine: "q35", OVMF: true, Guest: vmtest.NoGuest, MemoryMiB: 128}},
		{name: "TPM", shown: "tpm-crb, swtpm", with: func(t *testing.T, h *host) ([]string, string) {
			socket, missing := h.swtpm(t)
			return []string{"-chardev", "socket,id=tpm0,path=" + socket, "-tpmdev", "emulator,id=t0,chardev=tpm0", "-device", "tpm-crb,tpmdev=t0"}, missing
		}},
		{name: "DIMM, hot-plugged", shown: "device_add pc-dimm", cfg: args("-m", "size=64M,slots=2,maxmem=1G"),
			plug: func(t *testing.T, m *vmtest.Monitor) {
				do(t, m, "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "late", "size": 128 << 20})
				do(t, m, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm0", "memdev": "late"})
			}},
		{name: "shared memory with the host", shown: "ivshmem-plain", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-object", "memory-backend-file,id=shm,share=on,size=1M,mem-path=" + h.shm(t), "-device", "ivshmem-plain,memdev=shm"}, ""
		}},
		{name: "shared memory with the host, the VM being its master", shown: "ivshmem-plain,master=on", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-object", "memory-backend-file,id=shm,share=on,size=1M,mem-path=" + h.shm(t), "-device", "ivshmem-plain,memdev=shm,master=on"}, ""
		}},
		{name: "huge pages of 2 MiB", shown: "memory-backend-memfd,hugetlb=on", with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-object", "memory-backend-memfd,id=ram0,size=64M,hugetlb=on,hugetlbsize=2M", "-machine", "memory-backend=ram0"}, vmtest.HugePages(t, 2048, 40)
		}},
		{name: "huge pages of 2 MiB, a private file", shown: "memory-backend-file,mem-path=/dev/hugepages", with: func(t *testing.T, h *host) ([]string, string) {
			dir, missing := h.hugetlbfs(t)
			return []string{"-object", "memory-backend-file,id=ram0,size=64M,mem-path=" + dir, "-machine", "memory-backend=ram0"}, missing
		}},
		{name: "huge pages of 1 GiB", shown: "memory-backend-memfd,hugetlbsize=1G", cfg: vmtest.Config{MemoryMiB: 1024}, with: func(t *testing.T, h *host) ([]string, string) {
			return []string{"-object", "memory-backend-memfd,id=ram0,size=1G,hugetlb=on,hugetlbsize=1G", "-machine", "memory-backend=ram0"}, vmtest.HugePages(t, 1<<20, 1)
		}},
	}
}
