package manager

import "cgmanager/api"

var errRealtime = api.Errorf(api.Unsupported, "realtime is not served")

// RealtimeRefused implements api.RealtimeKit1.
func (m *Manager) RealtimeRefused(*api.Request) error { return errRealtime }

// MakeThreadRealtime implements api.RealtimeKit1.
func (m *Manager) MakeThreadRealtime(*api.Request, api.Thread, uint32) error { return errRealtime }

// MakeThreadHighPriority implements api.RealtimeKit1.
func (m *Manager) MakeThreadHighPriority(*api.Request, api.Thread, int32) error { return errRealtime }

// ResetKnown implements api.RealtimeKit1.
func (m *Manager) ResetKnown(*api.Request) error { return errRealtime }

// ResetAll implements api.RealtimeKit1.
func (m *Manager) ResetAll(*api.Request) error { return errRealtime }

// Exit implements api.RealtimeKit1.
func (m *Manager) Exit(*api.Request) error { return errRealtime }

// RealtimeProperties implements api.RealtimeKit1.
func (m *Manager) RealtimeProperties(*api.Request) (api.RealtimeProperties, error) {
	return api.RealtimeProperties{}, errRealtime
}

// ListGrants implements api.CGManager1.
func (m *Manager) ListGrants(*api.Request) ([]api.Grant, error) { return nil, errRealtime }

// Grant implements api.CGManager1.
func (m *Manager) Grant(*api.Request, uint32, string, int32) error { return errRealtime }

// Revoke implements api.CGManager1.
func (m *Manager) Revoke(*api.Request, uint32) error { return errRealtime }

// GrantLimits implements api.CGManager1.
func (m *Manager) GrantLimits(*api.Request, uint32) (map[string]string, error) {
	return nil, errRealtime
}

// RevokeLimits implements api.CGManager1.
func (m *Manager) RevokeLimits(*api.Request, uint32) ([]uint32, error) { return nil, errRealtime }
