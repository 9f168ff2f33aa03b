module cgmanager

go 1.26
