package e2e_test

import (
	"testing"

	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
