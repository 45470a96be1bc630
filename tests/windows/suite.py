"""Which part of the suite has to hold on Windows.

Whole files; a test in them that cannot run there is skipped by name, and says why.
"""

FILES = (
    # values, documents and codes
    "tests/unit/test_answers.py",
    "tests/unit/test_bridge_codes.py",
    "tests/unit/test_bridge_documents.py",
    "tests/unit/test_bridge_responses.py",
    "tests/unit/test_events.py",
    "tests/unit/test_frames.py",
    "tests/unit/test_guest_paths.py",
    "tests/unit/test_hcs_documents.py",
    "tests/unit/test_hcs_results.py",
    "tests/unit/test_host_paths.py",
    "tests/unit/test_identity.py",
    "tests/unit/test_lifecycle.py",
    "tests/unit/test_messages.py",
    "tests/unit/test_model.py",
    "tests/unit/test_owners.py",
    "tests/unit/test_records.py",
    "tests/unit/test_refusals.py",
    "tests/unit/test_requests.py",
    "tests/unit/test_secret.py",
    "tests/unit/test_slots.py",
    "tests/unit/test_surveys.py",
    "tests/unit/test_windows_paths.py",
    # what only a Windows can show
    "tests/windows/test_service.py",
    "tests/windows/test_windows.py",
    # the compute service
    "tests/unit/test_compute_system.py",
    "tests/unit/test_computecore.py",
    "tests/unit/test_hcs_grammar.py",
    "tests/unit/test_hcs_guest.py",
    "tests/unit/test_hcs_host.py",
    "tests/unit/test_windows_guests.py",
    # the bridge: to a guest that dials, over sockets in threads; else over TCP, see unix_sockets
    "tests/unit/test_bridge_accepting.py",
    "tests/unit/test_bridge_backend.py",
    "tests/unit/test_bridge_client.py",
    "tests/unit/test_bridge_cold_start.py",
    "tests/unit/test_bridge_entering.py",
    "tests/unit/test_bridge_listening.py",
    "tests/unit/test_bridge_returning.py",
    "tests/unit/test_bridge_threaded.py",
    "tests/unit/test_bridge_windows.py",
    "tests/unit/test_transport.py",
    # the Manager, on backends in memory
    "tests/model/test_manager_model.py",
    "tests/model/test_storms.py",
    "tests/unit/test_cancellation.py",
    "tests/unit/test_failures.py",
    "tests/unit/test_grants.py",
    "tests/unit/test_handover.py",
    "tests/unit/test_manager.py",
    "tests/unit/test_memory_backends.py",
    "tests/unit/test_reconciliation.py",
    "tests/unit/test_recovery.py",
    "tests/unit/test_release.py",
    "tests/unit/test_sharing.py",
    "tests/unit/test_side_by_side.py",
    "tests/unit/test_teardown.py",
    # and with its journal
    "tests/unit/test_cli_journal.py",
    "tests/unit/test_crashes.py",
    "tests/unit/test_journal.py",
    "tests/unit/test_survival.py",
)
"""Not here, where one might look for them: test_cli.py, as the command's demo, VMs and agent are
Linux' alone; test_grant_plans.py and test_acl.py, which are of Linux' access lists (what a Manager
does about access is test_grants.py's); test_portable.py, which shows on Linux what is shown here.
"""

WITHOUT_SERVICE = "tests/windows/test_without_service.py"
"""What holds where Windows has no compute service, in a run of its own."""
