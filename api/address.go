package api

import (
	"errors"
	"net/url"
	"strings"
)

// SocketName returns the name of the socket of a D-Bus address as package net has
// it: a path, or "@" and an abstract name. Other transports than unix are an error:
// who asks is taken from the kernel, which only this one tells.
func SocketName(address string) (string, error) {
	rest, _ := strings.CutPrefix(address, "unix:")
	for pair := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(pair, "=")
		prefix, known := map[string]string{"path": "", "abstract": "@"}[key]
		if !known || rest == address {
			continue
		}
		name, err := url.PathUnescape(value) // of the same form
		if err == nil && name == "" {
			err = errors.New("the name is empty")
		}
		return prefix + name, err
	}
	return "", errors.New("want unix:path=PATH or the path of a socket")
}
