package limits

import (
	"fmt"
	"testing"

	"cgmanager/api"
)

// Who fills an account keeps nobody out who is not charged to it.
func TestFull(t *testing.T) {
	var entries []*entry
	for i := range maxAccount {
		entries = append(entries, &entry{Accounts: []string{fmt.Sprintf("user:%d", i), "uid:1000"}})
	}
	for _, tc := range []struct {
		accounts []string
		full     bool
	}{
		{[]string{"user:9999", "uid:1000"}, true},
		{[]string{"uid:1000"}, true},
		{[]string{"uid:1001"}, false},
		{[]string{"user:1", "uid:1001"}, false},
	} {
		err := full(entries, tc.accounts)
		if (err != nil) != tc.full || err != nil && api.AsError(err).Kind != api.Limit {
			t.Errorf("%q: %v", tc.accounts, err)
		}
	}
	if err := full(entries[1:], []string{"uid:1000"}); err != nil {
		t.Errorf("with room for one: %v", err)
	}
	if err := full(make([]*entry, maxAll), nil); err == nil {
		t.Error("no bound on all")
	}
}
