package identity

// SearchPID is HostPID as on kernels without the ioctl.
func SearchPID(h *Host, p *Process, pid int32) (int32, bool) { return h.searchPID(p, pid) }

// PIDAtLevel is PIDIn as on kernels without the ioctl.
func PIDAtLevel(h *Host, p *Process, dir string) (uint32, bool) {
	level, ok := p.level()
	if !ok {
		return 0, false
	}
	return h.pidAtLevel(p, level, dir)
}
