package wire_test

import (
	"fmt"
	"testing"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// The texts are those that dbus_message_get_args of libdbus 1.14 was seen to give.
func TestWrongArguments(t *testing.T) {
	in := []api.Arg{{Name: "thread", Type: "t"}, {Name: "priority", Type: "u"}}
	for sig, want := range map[string]string{
		"tu": "", "tus": "", "tua{sv}": "",
		"t": "Message has only 1 arguments, but more were expected",
	} {
		if got := wire.WrongArguments(in, sig); string(got) != want {
			t.Errorf("%q: %q, want %q", sig, got, want)
		}
	}
	for sig, want := range map[string]string{
		"": "invalid", "y": "byte", "b": "boolean", "n": "int16", "q": "uint16", "i": "int32", "u": "uint32", "x": "int64",
		"d": "double", "s": "string", "o": "object_path", "g": "signature", "h": "unix_fd", "a{sv}u": "array", "(tu)": "struct", "v": "variant",
	} {
		want := fmt.Sprintf("Argument 0 is specified to be of type \"uint64\", but is actually of type %q\n", want)
		if got := wire.WrongArguments(in, sig); string(got) != want {
			t.Errorf("%q: %q, want %q", sig, got, want)
		}
	}
}
