package image

// Names in Machine.Facts that whoever takes a checkpoint records and a restore
// looks at: who the VM was, and whether its guest ran. All are optional; without
// them the search for a living original goes by name, UUID, sockets and images.
const (
	FactQEMUPID   = "qemu_pid"
	FactQEMUStart = "qemu_start_ticks"
	FactBootID    = "boot_id"
	FactGuestRuns = "guest_running" // "false": it was paused when the checkpoint was taken
	FactManager   = "manager"       // libvirt, proxmox: who started it
	FactFrozen    = "guest_frozen"  // "true": its file systems were frozen, and are in the image
	FactCPU       = "cpu_features"  // see vm.CPUFeatures

	FactDiscarded       = "discarded_attempts" // how many there were before this one succeeded
	FactDiscardedReason = "discarded_reason"   // of the last of them

	FactLibvirtURI    = "libvirt_uri"    // qemu:///system, qemu:///session
	FactLibvirtSocket = "libvirt_socket" // of the daemon that managed it
	// FactLibvirtSecrets is "missing" if the domain has passwords, which are not in
	// the recorded XML.
	FactLibvirtSecrets = "libvirt_secrets"
)

// RedactedMark stands in a recorded command line where a secret was.
const RedactedMark = "[redacted]"
