package plan

import "github.com/ckagent/ckagent/restore/netid"

// Recorded is what a checkpoint says about the VM: the part of the manifest that
// a plan needs.
type Recorded struct {
	VM, ID  string
	Binary  string   // path of the QEMU binary
	Argv    []string // arguments without argv[0], secrets redacted
	Changes []string // arguments that bring Argv up to the machine as it was
	// Redacted names what was taken out of Argv, as the recorder says it.
	Redacted []string
	Env      []string // NAME=value
	UID, GID int
	Groups   []int
	Cwd      string
	Machine  string // versioned machine type
	Accel    string
	Paused   bool // the guest was not running when the checkpoint was taken
	Libvirt  bool // it was a domain of libvirt's
	// Disks are the writable drives that get the content of the checkpoint. Other
	// drives use the images that the command line names.
	Disks []Disk
}

// Options is what the operator asked for.
type Options struct {
	Map     []Mapping
	Secrets map[string]string // secret object id -> file that holds it
	Extra   []string          // further QEMU arguments
	Binary  string            // instead of the recorded one
	QMPPath string            // socket of the restored VM; empty: RunDir/qmp.sock
	RunDir  string            // private directory of the restored VM, with VMDir in it
	DiskDir string            // where the files of Recorded.Disks are to be made
	// CloneID makes the restored VM a clone: another name, UUID and MACs derived
	// from this id, and no network, disk or socket shared with the original
	// unless mapped. Empty: the VM itself.
	CloneID string
	// ReadFile reads a file that the command line includes (-readconfig); relative
	// names are resolved against the recorded directory. Nil refuses them.
	ReadFile func(name string) ([]byte, error)
}

// Change is one difference between the recorded command line and the plan.
type Change struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// Copy is a file that a clone needs a copy of.
type Copy struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// File is a file the command line names.
type File struct {
	Path     string `json:"path"`
	Option   string `json:"option"` // the option that names it
	Writable bool   `json:"writable"`
	Firmware bool   `json:"firmware"` // pflash: its RAMBlock is the truth
	Created  bool   `json:"created"`  // QEMU creates it; only its directory must exist
}

// Socket is an address the restored QEMU listens on.
type Socket struct {
	Network string `json:"network"` // unix, tcp or udp
	Address string `json:"address"`
	Option  string `json:"option"`
}

// Plan is everything needed to start the VM again.
type Plan struct {
	Name    string   `json:"name"` // the guest's name
	UUID    string   `json:"uuid,omitempty"`
	Binary  string   `json:"binary"`
	Args    []string `json:"args"` // without argv[0]; {QMPFD} stands for the descriptor of the listening socket
	Env     []string `json:"env"`
	UID     int      `json:"uid"`
	GID     int      `json:"gid"`
	Groups  []int    `json:"groups,omitempty"`
	Cwd     string   `json:"cwd"`
	Machine string   `json:"machine"`
	QMPPath string   `json:"qmp"`
	RunDir  string   `json:"run_dir"`
	Clone   string   `json:"clone,omitempty"`
	Paused  bool     `json:"paused"` // do not resume: the guest was paused

	Changes []Change `json:"changes"`
	Files   []File   `json:"files"`
	Listen  []Socket `json:"listen"`
	Copies  []Copy   `json:"copies,omitempty"`
	// Disks are the files to be made for Recorded.Disks, in their order.
	Disks []DiskFile  `json:"disks,omitempty"`
	NICs  []netid.NIC `json:"nics,omitempty"` // on networks with others

	// Identity of the original, for the search for a process that still runs it.
	OldName  string   `json:"-"`
	OldUUID  string   `json:"-"`
	OldUnix  []string `json:"-"` // control sockets it listened on, absolute
	OldFiles []File   `json:"-"` // images it had open, before mapping
}

// QMPFD is the placeholder in Args for the descriptor number under which QEMU
// inherits its listening control socket.
const QMPFD = "{QMPFD}"

// VMDir is the part of a run directory that belongs to the user QEMU runs as. What
// lies beside it is believed by whoever restores, who may have more rights.
const VMDir = "vm"

// Identifiers of what a restore adds to a command line. A later restore of the
// restored VM finds and replaces them.
const (
	ownPrefix = "ckagent-"
	ownQMP    = ownPrefix + "qmp"
)
