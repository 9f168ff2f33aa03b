package proxy

import (
	"errors"
	"testing"

	"github.com/sirupsen/logrus/hooks/test"
)

// A client cannot fill the log with what becomes of its own connections below.
func TestLogIsBounded(t *testing.T) {
	log, lines := test.NewNullLogger()
	p := New(Config{Log: log})
	for range 1000 {
		p.isDown(errors.New("it closed the connection"))
		p.isUp()
	}
	if n := len(lines.AllEntries()); n < 2 || n > 20 {
		t.Errorf("%d lines", n)
	}
}
