package proxy

import "cgmanager/api"

var errRealtime = api.Errorf(api.Unsupported, "realtime is not served")

// RealtimeRefused implements api.RealtimeKit1.
func (p *Proxy) RealtimeRefused(*api.Request) error { return errRealtime }

// MakeThreadRealtime implements api.RealtimeKit1.
func (p *Proxy) MakeThreadRealtime(*api.Request, api.Thread, uint32) error { return errRealtime }

// MakeThreadHighPriority implements api.RealtimeKit1.
func (p *Proxy) MakeThreadHighPriority(*api.Request, api.Thread, int32) error { return errRealtime }

// ResetKnown implements api.RealtimeKit1.
func (p *Proxy) ResetKnown(*api.Request) error { return errRealtime }

// ResetAll implements api.RealtimeKit1.
func (p *Proxy) ResetAll(*api.Request) error { return errRealtime }

// Exit implements api.RealtimeKit1.
func (p *Proxy) Exit(*api.Request) error { return errRealtime }

// RealtimeProperties implements api.RealtimeKit1.
func (p *Proxy) RealtimeProperties(*api.Request) (api.RealtimeProperties, error) {
	return api.RealtimeProperties{}, errRealtime
}

// ListGrants implements api.CGManager1.
func (p *Proxy) ListGrants(*api.Request) ([]api.Grant, error) { return nil, errRealtime }

// Grant implements api.CGManager1.
func (p *Proxy) Grant(*api.Request, uint32, string, int32) error { return errRealtime }

// Revoke implements api.CGManager1.
func (p *Proxy) Revoke(*api.Request, uint32) error { return errRealtime }

// GrantLimits implements api.CGManager1.
func (p *Proxy) GrantLimits(*api.Request, uint32) (map[string]string, error) {
	return nil, errRealtime
}

// RevokeLimits implements api.CGManager1.
func (p *Proxy) RevokeLimits(*api.Request, uint32) ([]uint32, error) { return nil, errRealtime }
