//go:build purego

package datapath

const purego = true
