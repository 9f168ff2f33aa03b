package manager

// HoldMoves has requests that move the process pid wait, right before they look for the
// last time whether it still is where it was. waiting reports whether one does.
func (m *Manager) HoldMoves(pid int32) (release func(), waiting func() bool) {
	return m.moving.lock(pid), func() bool {
		m.moving.mu.Lock()
		defer m.moving.mu.Unlock()
		return m.moving.held[pid].users > 1
	}
}
